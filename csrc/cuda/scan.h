// Sums of a long array on the device: CUB's, and the standard library's for the tests on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

#ifdef SPEFT_ON_HOST
    #include <numeric>
#else
    #include <cub/device/device_scan.cuh>
#endif

namespace speft {
namespace cuda {

// In place: each number becomes the sum of those before it. With scratch a null pointer nothing is
// launched, and *scratch_bytes becomes what it needs.
inline int sums_before(void* scratch, size_t* scratch_bytes, int64_t* numbers, int64_t count,
                       void* stream) {
#ifdef SPEFT_ON_HOST
    if (scratch != nullptr) std::exclusive_scan(numbers, numbers + count, numbers, int64_t(0));
    *scratch_bytes = 1;
    static_cast<void>(stream);
    return 0;
#else
    return told(cub::DeviceScan::ExclusiveSum(scratch, *scratch_bytes, numbers, numbers, count,
                                              cudaStream_t(stream)));
#endif
}

}  // namespace cuda
}  // namespace speft
