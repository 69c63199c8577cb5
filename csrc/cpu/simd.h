// Vector types and function multiversioning.
#pragma once

#include <cstdint>

// A hot loop marked SPEFT_MULTIVERSION is compiled for AVX-512, for AVX2 with FMA, and for the
// baseline; the loader picks one when the library is loaded. Its body must be free of OpenMP
// constructs (GCC does not clone the functions it outlines for them) and calls only
// SPEFT_INLINE functions (anything else would be compiled for the baseline alone).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    !defined(SPEFT_NO_MULTIVERSION)
    #if defined(__clang__) || __GNUC__ >= 12
        #define SPEFT_MULTIVERSION \
            __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
    #else
        #define SPEFT_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
    #endif
#else
    #define SPEFT_MULTIVERSION
#endif

#define SPEFT_INLINE inline __attribute__((always_inline))

namespace speft {

constexpr int kVectorBytes = 64;

// 64 bytes of T: one AVX-512 register, two of AVX2, four of SSE or NEON.
template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
SPEFT_INLINE Vector<T> load_aligned(const T* p) {
    return *reinterpret_cast<const Vector<T>*>(p);
}

template <class T>
SPEFT_INLINE T sum_lanes(const Vector<T>& v) {
    // Neighbours first, as a tree: the order of add_sums_of_lanes, so that a sum does not depend on
    // which of the two took it.
    T part[VectorOf<T>::lanes];
    __builtin_memcpy(part, &v, sizeof(v));
    for (int width = VectorOf<T>::lanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            part[i] = part[2 * i] + part[2 * i + 1];
    return part[0];
}

// out[i] += the sum of the lanes of vector i, for four vectors at once.
template <class T>
SPEFT_INLINE void add_sums_of_lanes(const Vector<T>& a, const Vector<T>& b, const Vector<T>& c,
                                    const Vector<T>& d, T* out) {
    out[0] += sum_lanes<T>(a);
    out[1] += sum_lanes<T>(b);
    out[2] += sum_lanes<T>(c);
    out[3] += sum_lanes<T>(d);
}

#if defined(__clang__) || __GNUC__ >= 12
// Halving the four vectors together takes a third of the instructions that four sums take.
template <>
SPEFT_INLINE void add_sums_of_lanes<float>(const Vector<float>& a, const Vector<float>& b,
                                           const Vector<float>& c, const Vector<float>& d,
                                           float* out) {
    #define SPEFT_FOLD(x, y)                                                                  \
        (__builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, \
                                 30) +                                                        \
         __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    const Vector<float> ab = SPEFT_FOLD(a, b), cd = SPEFT_FOLD(c, d);
    #undef SPEFT_FOLD
    const Vector<float> all =
        __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    float part[16];
    __builtin_memcpy(part, &all, sizeof(all));
    for (int i = 0; i < 4; ++i)
        out[i] += (part[i] + part[i + 4]) + (part[i + 8] + part[i + 12]);
}
#endif

// Turns a square of vectors: v[i][j] becomes v[j][i].
template <class T>
SPEFT_INLINE void transpose(Vector<T>* v) {
    constexpr int lanes = VectorOf<T>::lanes;
    T from[lanes][lanes], to[lanes][lanes];
    __builtin_memcpy(from, v, sizeof(from));
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < lanes; ++j)
            to[j][i] = from[i][j];
    __builtin_memcpy(v, to, sizeof(to));
}

#if defined(__clang__) || __GNUC__ >= 12
// In registers: pairs, then fours, within quarters of the vectors; then the quarters themselves.
template <>
SPEFT_INLINE void transpose<float>(Vector<float>* v) {
    #define SPEFT_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
    #define SPEFT_EVEN(a, b) \
        SPEFT_MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
    #define SPEFT_ODD(a, b) \
        SPEFT_MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
    Vector<float> t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = SPEFT_MIX(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        t[i + 1] =
            SPEFT_MIX(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            const Vector<float> a = t[i + j], b = t[i + 2 + j];
            v[i + 2 * j] =
                SPEFT_MIX(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            v[i + 2 * j + 1] =
                SPEFT_MIX(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    // Now quarter q of v[4 * i + j] is column 4 * q + j of rows 4 * i to 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        const Vector<float> even01 = SPEFT_EVEN(v[j], v[4 + j]), odd01 = SPEFT_ODD(v[j], v[4 + j]),
                            even23 = SPEFT_EVEN(v[8 + j], v[12 + j]),
                            odd23 = SPEFT_ODD(v[8 + j], v[12 + j]);
        t[j] = SPEFT_EVEN(even01, even23);
        t[8 + j] = SPEFT_ODD(even01, even23);
        t[4 + j] = SPEFT_EVEN(odd01, odd23);
        t[12 + j] = SPEFT_ODD(odd01, odd23);
    }
    for (int i = 0; i < 16; ++i)
        v[i] = t[i];
    #undef SPEFT_ODD
    #undef SPEFT_EVEN
    #undef SPEFT_MIX
}
#endif

}  // namespace speft
