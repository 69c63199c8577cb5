#include "panel.h"

#include <type_traits>

namespace speft {
namespace {

// A square of the matrix is turned in registers, which costs the same for one used column as for
// all of them: up to this many columns of a group are fetched one element at a time instead.
constexpr int kFewColumns = 2;

// A panel of the accumulator's type gets widened elements; one of the matrix's own type their bits,
// which nothing rounds. While a square is turned, those of a half lie in the low half of a lane.
template <class Out, class T>
SPEFT_INLINE Out element(T from) {
    if constexpr (std::is_same<T, Out>::value)
        return from;
    else
        return widen(from);
}

template <class Out, int kBytes, class T>
SPEFT_INLINE Vector<Accumulator<T>, kBytes> load_lanes(const T* from) {
    using Acc = Accumulator<T>;
    if constexpr (std::is_same<T, Acc>::value) {
        return load<T, kBytes>(from);
    } else if constexpr (std::is_same<T, Out>::value) {
        const auto bits = load<uint16_t, kBytes / 2>(&from->bits);
        return bit_cast<Vector<float, kBytes>>(
            __builtin_convertvector(bits, Vector<uint32_t, kBytes>));
    } else {
        constexpr int lanes = VectorOf<Acc, kBytes>::lanes;
        Acc wide[lanes];
        for (int i = 0; i < lanes; ++i)
            wide[i] = widen(from[i]);
        return load<Acc, kBytes>(wide);
    }
}
template <int kBytes, class Out>
SPEFT_INLINE void store_lanes(const Vector<Accumulator<Out>, kBytes>& v, Out* to) {
    if constexpr (std::is_same<Out, Accumulator<Out>>::value) {
        __builtin_memcpy(to, &v, kBytes);
    } else {
        const auto bits = __builtin_convertvector(bit_cast<Vector<uint32_t, kBytes>>(v),
                                                  Vector<uint16_t, kBytes / 2>);
        __builtin_memcpy(to, &bits, kBytes / 2);
    }
}

// `lanes` tokens from t0 on, of `count` columns that lie within [first, first + lanes).
template <int kBytes, class T, class Out>
SPEFT_INLINE void pack_square(const Tokens<T>& matrix, int t0, int64_t first,
                              const int32_t* columns, int64_t count, int width, Out* panel) {
    using Acc = Accumulator<T>;
    constexpr int lanes = VectorOf<Acc, kBytes>::lanes;
    const T* from = matrix.data + t0 * matrix.stride + first;
    Vector<Acc, kBytes> square[lanes];
    for (int t = 0; t < lanes; ++t) {
        square[t] = load_lanes<Out, kBytes>(from + t * matrix.stride);
        // Of the square below: 16 rows at once are more streams than the processor follows (a
        // tenth of the time, real masks).
        __builtin_prefetch(from + (t + lanes) * matrix.stride);
    }
    transpose<Acc, kBytes>(square);
    // The unused columns go to waste, so that all vectors are stored from where they are.
    alignas(kVectorBytes) Out waste[lanes];
    Out* to[lanes];
    for (int j = 0; j < lanes; ++j)
        to[j] = waste;
    for (int64_t c = 0; c < count; ++c)
        to[columns[c] - first] = panel + c * width + t0;
    for (int j = 0; j < lanes; ++j)
        store_lanes<kBytes>(square[j], to[j]);
}

template <class T, class Out>
SPEFT_INLINE void pack_singly(const Tokens<T>& matrix, int t0, int step, const int32_t* columns,
                              int64_t count, int width, Out* panel) {
    const int valid = std::min(std::max(matrix.tokens - t0, 0), step);
    for (int64_t c = 0; c < count; ++c) {
        const T* from = matrix.data + t0 * matrix.stride + columns[c];
        Out* to = panel + c * width + t0;
        for (int t = 0; t < valid; ++t)
            to[t] = element<Out>(from[t * matrix.stride]);
        for (int t = valid; t < step; ++t)
            to[t] = Out{};
    }
}

template <int kBytes, class T, class Out>
SPEFT_INLINE void pack(const Tokens<T>& matrix, const int32_t* columns, int64_t count, int width,
                       Out* panel) {
    constexpr int lanes = VectorOf<Accumulator<T>, kBytes>::lanes;
    // Tokens in the outer loop: as many rows as a square has are read from end to end, and each
    // line of them once.
    for (int t0 = 0; t0 < width; t0 += lanes) {
        const bool whole = t0 + lanes <= matrix.tokens;
        for (int64_t c = 0; c < count;) {
            const int64_t group = columns[c] / lanes * lanes;
            int64_t next = c + 1;
            // The list may start over in the same group (hot columns come first).
            while (next < count && columns[next] > columns[next - 1] &&
                   columns[next] < group + lanes)
                ++next;
            if (whole && next - c > kFewColumns && group + lanes <= matrix.columns)
                pack_square<kBytes>(matrix, t0, group, columns + c, next - c, width,
                                    panel + c * width);
            else
                pack_singly(matrix, t0, lanes, columns + c, next - c, width, panel + c * width);
            c = next;
        }
    }
}

}  // namespace

#define SPEFT_DEFINE_PACK(T, Out)                                                              \
    void pack_panel(const Tokens<T>& matrix, const int32_t* columns, int64_t count, int width, \
                    Out* panel) {                                                              \
        vectorised([&](auto bytes)                                                             \
                       SPEFT_INLINED { pack<bytes>(matrix, columns, count, width, panel); });  \
    }
SPEFT_DEFINE_PACK(float, float)
SPEFT_DEFINE_PACK(double, double)
SPEFT_DEFINE_PACK(BFloat16, float)
SPEFT_DEFINE_PACK(Float16, float)
SPEFT_DEFINE_PACK(BFloat16, BFloat16)
SPEFT_DEFINE_PACK(Float16, Float16)

}  // namespace speft
