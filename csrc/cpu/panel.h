// Panels: used columns of a row-major matrix, transposed and widened, one block of tokens at a
// time.
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

// panel[c * width + t] = matrix[t, columns[c]] for c in `range` and t < tokens; zero for the rest
// of the width. `matrix` points at the block's first token.
#define SPEFT_DECLARE_PACK(T)                                                            \
    void pack_panel(const T* matrix, int64_t stride, int tokens, const int32_t* columns, \
                    Range range, int width, Accumulator<T>* panel);
SPEFT_DECLARE_PACK(float)
SPEFT_DECLARE_PACK(double)
SPEFT_DECLARE_PACK(BFloat16)
SPEFT_DECLARE_PACK(Float16)
#undef SPEFT_DECLARE_PACK

}  // namespace speft
