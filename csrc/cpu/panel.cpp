#include "panel.h"

namespace speft {
namespace {

// A square of the matrix is turned in registers, which costs the same for one used column as for
// all of them: up to this many columns of a group are fetched one element at a time instead.
constexpr int kFewColumns = 2;

SPEFT_INLINE void store(const Vector<float>& v, float* to) {
    __builtin_memcpy(to, &v, sizeof(v));
}
SPEFT_INLINE void store(const Vector<double>& v, double* to) {
    __builtin_memcpy(to, &v, sizeof(v));
}
template <class Half>
SPEFT_INLINE void store(const Vector<float>& v, Half* to) {
    for (int i = 0; i < VectorOf<float>::lanes; ++i)
        narrow(v[i], to + i);
}

SPEFT_INLINE Vector<float> load_widened(const float* from) {
    Vector<float> v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
}
template <class T>
SPEFT_INLINE Vector<Accumulator<T>> load_widened(const T* from) {
    using Acc = Accumulator<T>;
    Acc wide[VectorOf<Acc>::lanes];
    for (int i = 0; i < VectorOf<Acc>::lanes; ++i)
        wide[i] = widen(from[i]);
    Vector<Acc> v;
    __builtin_memcpy(&v, wide, sizeof(v));
    return v;
}

// `lanes` tokens from t0 on, of `count` columns that lie within [first, first + lanes).
template <class T, class Out>
SPEFT_INLINE void pack_square(const Tokens<T>& matrix, int t0, int64_t first,
                              const int32_t* columns, int64_t count, int width, Out* panel) {
    using Acc = Accumulator<T>;
    constexpr int lanes = VectorOf<Acc>::lanes;
    const T* from = matrix.data + t0 * matrix.stride + first;
    Vector<Acc> square[lanes];
    for (int t = 0; t < lanes; ++t) {
        square[t] = load_widened(from + t * matrix.stride);
        // Of the square below: 16 rows at once are more streams than the processor follows (a
        // tenth of the time, real masks).
        __builtin_prefetch(from + (t + lanes) * matrix.stride);
    }
    transpose<Acc>(square);
    // The unused columns go to waste, so that all vectors are stored from where they are.
    alignas(kVectorBytes) Out waste[lanes];
    Out* to[lanes];
    for (int j = 0; j < lanes; ++j)
        to[j] = waste;
    for (int64_t c = 0; c < count; ++c)
        to[columns[c] - first] = panel + c * width + t0;
    for (int j = 0; j < lanes; ++j)
        store(square[j], to[j]);
}

template <class T, class Out>
SPEFT_INLINE void pack_singly(const Tokens<T>& matrix, int t0, int step, const int32_t* columns,
                              int64_t count, int width, Out* panel) {
    const int valid = std::min(std::max(matrix.tokens - t0, 0), step);
    for (int64_t c = 0; c < count; ++c) {
        const T* from = matrix.data + t0 * matrix.stride + columns[c];
        Out* to = panel + c * width + t0;
        for (int t = 0; t < valid; ++t)
            narrow(widen(from[t * matrix.stride]), to + t);
        for (int t = valid; t < step; ++t)
            narrow(Accumulator<T>(0), to + t);
    }
}

template <class T, class Out>
SPEFT_INLINE void pack(const Tokens<T>& matrix, const int32_t* columns, int64_t count, int width,
                       Out* panel) {
    constexpr int lanes = VectorOf<Accumulator<T>>::lanes;
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
                pack_square(matrix, t0, group, columns + c, next - c, width, panel + c * width);
            else
                pack_singly(matrix, t0, lanes, columns + c, next - c, width, panel + c * width);
            c = next;
        }
    }
}

}  // namespace

#define SPEFT_DEFINE_PACK(T, Out)                                                       \
    SPEFT_MULTIVERSION void pack_panel(const Tokens<T>& matrix, const int32_t* columns, \
                                       int64_t count, int width, Out* panel) {          \
        pack(matrix, columns, count, width, panel);                                     \
    }
SPEFT_DEFINE_PACK(float, float)
SPEFT_DEFINE_PACK(double, double)
SPEFT_DEFINE_PACK(BFloat16, float)
SPEFT_DEFINE_PACK(Float16, float)
SPEFT_DEFINE_PACK(BFloat16, BFloat16)
SPEFT_DEFINE_PACK(Float16, Float16)

}  // namespace speft
