// Sums of all that come before, over a block and over a long array on the device: CUB's, and the
// standard library's for the tests on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

#ifdef SPEFT_ON_HOST
    #include <numeric>
#else
    #include <cub/block/block_scan.cuh>
    #include <cub/device/device_scan.cuh>
#endif

namespace speft {
namespace cuda {

// What sum_before takes of the shared memory of a block of kBlock threads.
#ifdef SPEFT_ON_HOST
template <int kBlock, class N>
struct SumsOfBlock {
    N numbers[kBlock];
};
#else
template <int kBlock, class N>
using BlockScan = ::cub::BlockScan<N, kBlock, ::cub::BLOCK_SCAN_WARP_SCANS>;
template <int kBlock, class N>
using SumsOfBlock = typename BlockScan<kBlock, N>::TempStorage;
#endif

// The sum of what the threads before this one bring, and that of all. Every thread must come, and
// pass another barrier before it comes again.
template <int kBlock, class N>
SPEFT_DEVICE N sum_before(N mine, SumsOfBlock<kBlock, N>& shared, N* total) {
#ifdef SPEFT_ON_HOST
    shared.numbers[threadIdx.x] = mine;
    sync_block();
    *total = std::accumulate(shared.numbers, shared.numbers + kBlock, N(0));
    return std::accumulate(shared.numbers, shared.numbers + threadIdx.x, N(0));
#else
    N before;
    BlockScan<kBlock, N>(shared).ExclusiveSum(mine, before, *total);
    return before;
#endif
}

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
