// The element types of the kernels, and their conversion to and from the accumulator's type.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../dtypes.h"
#include "simd.h"

namespace speft {

template <class To, class From>
SPEFT_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

SPEFT_INLINE float widen(float x) {
    return x;
}
SPEFT_INLINE double widen(double x) {
    return x;
}
SPEFT_INLINE float widen(BFloat16 x) {
    return bit_cast<float>(uint32_t(x.bits) << 16);
}
SPEFT_INLINE float widen(Float16 x) {
    // Exponent and mantissa shifted into float32's place; then the exponent's bias corrected, 127
    // instead of 15. Inf and NaN keep a full exponent. A subnormal is its mantissa times 2^-24: the
    // mantissa is read off 2^23 + mantissa, so that no float32 subnormal occurs, which a processor
    // may be set to take for zero.
    const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
    const uint32_t exponent = x.bits & 0x7c00u;
    const uint32_t normal = magnitude + (uint32_t(127 - 15) << 23);
    const uint32_t special = magnitude | 0x7f800000u;
    const float mantissa = bit_cast<float>(0x4b000000u | (x.bits & 0x3ffu)) - 8388608.0f;
    const uint32_t subnormal =
        bit_cast<uint32_t>(mantissa * bit_cast<float>(uint32_t(127 - 24) << 23));
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    return bit_cast<float>((exponent == 0         ? subnormal
                            : exponent == 0x7c00u ? special
                                                  : normal) |
                           sign);
}

// Rounding is to nearest, ties to even, as torch rounds.
SPEFT_INLINE void narrow(float x, float* out) {
    *out = x;
}
SPEFT_INLINE void narrow(double x, double* out) {
    *out = x;
}
SPEFT_INLINE void narrow(float x, BFloat16* out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
SPEFT_INLINE void narrow(float x, Float16* out) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // All of them are computed, so that a loop of narrowings has no branch and runs in vectors.
    // Below 2^-14 the result is subnormal: adding 0.5 puts its last bit, 2^-24, at float32's last
    // bit, so the addition itself rounds.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0.5f);
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - (uint32_t(112) << 23) + 0xfffu + odd) >> 13;
    const uint32_t result = magnitude > 0x7f800000u    ? 0x7e00u
                            : magnitude >= 0x477ff000u ? 0x7c00u  // 65520, rounds to infinity
                            : magnitude < 0x38800000u  ? subnormal
                                                       : normal;
    out->bits = uint16_t(sign | result);
}

// Calls f with a null pointer of the element type that `dtype` names. Throws where there is none.
template <class F>
void dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(static_cast<float*>(nullptr));
        case DType::kFloat64:
            return f(static_cast<double*>(nullptr));
        case DType::kBFloat16:
            return f(static_cast<BFloat16*>(nullptr));
        case DType::kFloat16:
            return f(static_cast<Float16*>(nullptr));
    }
    throw std::invalid_argument("no dtype has the code " + std::to_string(int(dtype)));
}

}  // namespace speft
