// Panels: used columns of a row-major matrix, transposed, one block of tokens at a time.
//
// A sum over tokens then runs along contiguous memory, whatever the columns are, and the panels of
// one block of tokens stay in the L2 cache while every entry reads them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"
#include "parallel.h"
#include "simd.h"

namespace speft {

// Both panels of a kernel together: half of a 2 MB L2, most of a 1.25 MB one.
constexpr int64_t kPanelBytes = 1 << 20;
constexpr int kTokenStep = 16;  // a multiple of the lanes of every accumulator type
constexpr int kMostTokens = 256;

// Tokens in a block for panels of `columns` columns in all: as many as kPanelBytes holds, at least
// kTokenStep (a panel of a very wide layer is larger than kPanelBytes: 64 bytes a used column),
// and no more than the `tokens` there are.
template <class Acc>
inline int block_tokens(int64_t columns, int64_t tokens) {
    const int64_t fit = kPanelBytes / int64_t(sizeof(Acc)) / std::max<int64_t>(columns, 1);
    const int64_t most =
        std::min<int64_t>(kMostTokens, (tokens + kTokenStep - 1) / kTokenStep * kTokenStep);
    return int(std::max<int64_t>(kTokenStep, std::min(fit / kTokenStep * kTokenStep, most)));
}

// Work on panels is counted in products of one entry and one token, some 0.08 ns each with AVX-512.
// To pack an element costs as much as kWorkOfPacking; a thread should have 20 us.
constexpr int64_t kWorkOfPacking = 4, kPanelWorkPerThread = 1 << 18;

// Some tokens of a row-major matrix: `data` points at the first of `tokens` rows, `columns` long
// and `stride` elements apart.
template <class T>
struct Tokens {
    const T* data;
    int64_t stride, columns;
    int tokens;
};

// panel[c * width + t] = matrix[t, columns[c]] for c < count; zero for `tokens` <= t < width. The
// columns are in any order; neighbours in the matrix that are neighbours in the list are fastest.
// `width` is a multiple of kTokenStep, the panel aligned for vectors.
#define SPEFT_DECLARE_PACK(T, Out)                                                             \
    void pack_panel(const Tokens<T>& matrix, const int32_t* columns, int64_t count, int width, \
                    Out* panel);
SPEFT_DECLARE_PACK(float, float)
SPEFT_DECLARE_PACK(double, double)
SPEFT_DECLARE_PACK(BFloat16, float)
SPEFT_DECLARE_PACK(Float16, float)
SPEFT_DECLARE_PACK(BFloat16, BFloat16)
SPEFT_DECLARE_PACK(Float16, Float16)
#undef SPEFT_DECLARE_PACK

}  // namespace speft
