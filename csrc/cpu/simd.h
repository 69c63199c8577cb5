// Vectors, and which instruction set they run on.
#pragma once

#include <cstdint>
#include <type_traits>

#define SPEFT_INLINE inline __attribute__((always_inline))
// After the parameters of a lambda: inlined wherever it is called.
#define SPEFT_INLINED __attribute__((always_inline))

namespace speft {

// The instruction sets that hot loops are compiled for, by the bytes of a vector register.
constexpr int kBaseline = 16;  // SSE2, NEON
constexpr int kAvx2 = 32;      // with FMA
constexpr int kAvx512 = 64;

#if defined(__x86_64__) && defined(__GNUC__)
    #define SPEFT_AVX2_TARGET "avx2,fma,bmi,bmi2"
    #define SPEFT_AVX512_TARGET SPEFT_AVX2_TARGET ",avx512f,avx512bw,avx512dq,avx512vl"

inline int best_registers() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return !avx2 ? kBaseline : !avx512 ? kAvx2 : kAvx512;
}

template <class F>
__attribute__((target(SPEFT_AVX512_TARGET))) auto on_avx512(const F& f) {
    return f(std::integral_constant<int, kAvx512>{});
}
template <class F>
__attribute__((target(SPEFT_AVX2_TARGET))) auto on_avx2(const F& f) {
    return f(std::integral_constant<int, kAvx2>{});
}
#else
inline int best_registers() {
    return kBaseline;
}
#endif

// What this processor has; the tests set less.
inline int registers = best_registers();

// Calls f(kBytes), compiled for the best instruction set that there is; kBytes, a constant, is the
// width of its registers. f is a SPEFT_INLINED lambda: a hot loop, without OpenMP constructs, that
// calls only SPEFT_INLINE functions (anything else would be compiled for the baseline alone).
template <class F>
auto vectorised(const F& f) {
#ifdef SPEFT_AVX2_TARGET
    if (registers == kAvx512) return on_avx512(f);
    if (registers == kAvx2) return on_avx2(f);
#endif
    return f(std::integral_constant<int, kBaseline>{});
}

template <class T, int kBytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(kBytes)));
    static constexpr int lanes = kBytes / sizeof(T);
};
// A register of T.
template <class T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <class T, int kBytes>
SPEFT_INLINE Vector<T, kBytes> load(const T* from) {
    Vector<T, kBytes> v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
}

// What a sum runs along, on every instruction set, so that its order is the same: 64 bytes of T, in
// as many registers as that takes. Memory is aligned to as much.
constexpr int kVectorBytes = 64;

template <class T, int kBytes>
struct Lanes {
    static constexpr int count = kVectorBytes / sizeof(T);
    static constexpr int parts = kVectorBytes / kBytes;
    Vector<T, kBytes> part[parts] = {};

    static SPEFT_INLINE Lanes from(const T* p) {
        Lanes lanes;
        for (int i = 0; i < parts; ++i)
            lanes.part[i] = load<T, kBytes>(p + i * VectorOf<T, kBytes>::lanes);
        return lanes;
    }
    SPEFT_INLINE void add_product(const Lanes& a, const Lanes& b) {
        for (int i = 0; i < parts; ++i)
            part[i] += a.part[i] * b.part[i];
    }
    SPEFT_INLINE void add_product(T a, const Lanes& b) {
        for (int i = 0; i < parts; ++i)
            part[i] += a * b.part[i];
    }
    SPEFT_INLINE void to(T* p) const { __builtin_memcpy(p, part, sizeof(part)); }
};

// Neighbours first, as a tree: the order of add_sums_of_lanes, so that a sum does not depend on
// which of the two took it.
template <class T, int kBytes>
SPEFT_INLINE T sum_lanes(const Lanes<T, kBytes>& v) {
    T part[Lanes<T, kBytes>::count];
    v.to(part);
    for (int width = Lanes<T, kBytes>::count / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            part[i] = part[2 * i] + part[2 * i + 1];
    return part[0];
}

// Element e of a pair of vectors of `lanes` elements, counted within their quarter q (16 bytes of
// float32): 0 to 3 are the first vector's, 4 to 7 the second's.
constexpr int place_in_pair(int e, int q, int lanes) {
    return 4 * q + (e < 4 ? e : lanes + e - 4);
}

// Four elements of x and y, the same ones in each quarter.
#ifdef __clang__
    #define SPEFT_SHUFFLE(kBytes, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC has that name from version 12 on
    #define SPEFT_SHUFFLE(kBytes, x, y, ...) \
        __builtin_shuffle(x, y, Vector<int32_t, kBytes>{__VA_ARGS__})
#endif
template <int a, int b, int c, int d, int kBytes>
SPEFT_INLINE Vector<float, kBytes> in_quarters(const Vector<float, kBytes>& x,
                                               const Vector<float, kBytes>& y) {
    constexpr int lanes = VectorOf<float, kBytes>::lanes;
#define SPEFT_QUARTER(q)                                                                \
    place_in_pair(a, q, lanes), place_in_pair(b, q, lanes), place_in_pair(c, q, lanes), \
        place_in_pair(d, q, lanes)
    if constexpr (kBytes == 16)
        return SPEFT_SHUFFLE(kBytes, x, y, SPEFT_QUARTER(0));
    else if constexpr (kBytes == 32)
        return SPEFT_SHUFFLE(kBytes, x, y, SPEFT_QUARTER(0), SPEFT_QUARTER(1));
    else
        return SPEFT_SHUFFLE(kBytes, x, y, SPEFT_QUARTER(0), SPEFT_QUARTER(1), SPEFT_QUARTER(2),
                             SPEFT_QUARTER(3));
#undef SPEFT_QUARTER
}

// out[i] += the sum of the lanes of vector i, for four vectors at once.
template <class T, int kBytes>
SPEFT_INLINE void add_sums_of_lanes(const Lanes<T, kBytes>* v, T* out) {
    if constexpr (std::is_same<T, float>::value) {
        // Halved together, they take a third of the instructions that four sums take.
        const auto pairs = [](const auto& x, const auto& y) SPEFT_INLINED {
            return in_quarters<0, 2, 4, 6, kBytes>(x, y) + in_quarters<1, 3, 5, 7, kBytes>(x, y);
        };
        Lanes<float, kBytes> fours;
        for (int i = 0; i < fours.parts; ++i)
            fours.part[i] =
                pairs(pairs(v[0].part[i], v[1].part[i]), pairs(v[2].part[i], v[3].part[i]));
        // Quarter q now has lanes 4 q to 4 q + 3 of each vector, summed.
        Vector<float, 16> quarter[4], sums = load<float, 16>(out);
        __builtin_memcpy(quarter, fours.part, sizeof(quarter));
        sums += (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
        __builtin_memcpy(out, &sums, sizeof(sums));
    } else {
        for (int i = 0; i < 4; ++i)
            out[i] += sum_lanes(v[i]);
    }
}

// Turns a square of as many vectors as they have elements: v[i][j] becomes v[j][i].
template <class T, int kBytes>
SPEFT_INLINE void transpose(Vector<T, kBytes>* v) {
    constexpr int lanes = VectorOf<T, kBytes>::lanes;
    if constexpr (!std::is_same<T, float>::value) {
        T from[lanes][lanes], to[lanes][lanes];
        __builtin_memcpy(from, v, sizeof(from));
        for (int i = 0; i < lanes; ++i)
            for (int j = 0; j < lanes; ++j)
                to[j][i] = from[i][j];
        __builtin_memcpy(v, to, sizeof(to));
    } else {
        // In registers: pairs, then fours, within the quarters of the vectors; then the quarters.
        Vector<float, kBytes> t[lanes];
        for (int i = 0; i < lanes; i += 2) {
            t[i] = in_quarters<0, 4, 1, 5, kBytes>(v[i], v[i + 1]);
            t[i + 1] = in_quarters<2, 6, 3, 7, kBytes>(v[i], v[i + 1]);
        }
        for (int i = 0; i < lanes; i += 4)
            for (int j = 0; j < 2; ++j) {
                v[i + 2 * j] = in_quarters<0, 1, 4, 5, kBytes>(t[i + j], t[i + j + 2]);
                v[i + 2 * j + 1] = in_quarters<2, 3, 6, 7, kBytes>(t[i + j], t[i + j + 2]);
            }
        // Now quarter q of v[4 * i + j] is column 4 * q + j of rows 4 * i to 4 * i + 3.
        if constexpr (kBytes == 32) {
            for (int j = 0; j < 4; ++j) {
                const Vector<float, kBytes> top = v[j], bottom = v[4 + j];
                v[j] = SPEFT_SHUFFLE(kBytes, top, bottom, 0, 1, 2, 3, 8, 9, 10, 11);
                v[4 + j] = SPEFT_SHUFFLE(kBytes, top, bottom, 4, 5, 6, 7, 12, 13, 14, 15);
            }
        } else if constexpr (kBytes == 64) {
            const auto even = [](const auto& x, const auto& y) SPEFT_INLINED {
                return SPEFT_SHUFFLE(kBytes, x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25,
                                     26, 27);
            };
            const auto odd = [](const auto& x, const auto& y) SPEFT_INLINED {
                return SPEFT_SHUFFLE(kBytes, x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28,
                                     29, 30, 31);
            };
            for (int j = 0; j < 4; ++j) {
                const auto even01 = even(v[j], v[4 + j]), odd01 = odd(v[j], v[4 + j]),
                           even23 = even(v[8 + j], v[12 + j]), odd23 = odd(v[8 + j], v[12 + j]);
                v[j] = even(even01, even23);
                v[8 + j] = odd(even01, even23);
                v[4 + j] = even(odd01, odd23);
                v[12 + j] = odd(odd01, odd23);
            }
        }
    }
}

}  // namespace speft
