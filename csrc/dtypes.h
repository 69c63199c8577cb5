// The element types that cross the border between Python and the kernels.
#pragma once

#include <cstdint>

namespace speft {

// The codes that Python passes (speft_kernels/_native.py).
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// float64 accumulates in float64, everything else in float32.
template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace speft
