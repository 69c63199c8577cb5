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
    // Pairwise, in a fixed order: the same result on every instruction set.
    T part[VectorOf<T>::lanes];
    __builtin_memcpy(part, &v, sizeof(v));
    for (int width = VectorOf<T>::lanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            part[i] += part[i + width];
    return part[0];
}

}  // namespace speft
