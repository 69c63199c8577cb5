// Sums of all that come before, over a block and over a warp: CUB's, and plain loops for the tests
// on a CPU.
#pragma once

#include <cstdint>

#include "device.h"

#ifdef SPEFT_ON_HOST
    #include <numeric>
#else
    #include <cub/block/block_scan.cuh>
    #include <cub/warp/warp_scan.cuh>
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

// The same over a warp, every lane of which must come.
#ifdef SPEFT_ON_HOST
template <class N>
N sum_before_in_warp(N mine, N* total, int line = __builtin_LINE()) {
    const unsigned char* const all = host::gather(mine, line);
    N before = 0;
    *total = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
        if (lane == lane_id()) before = *total;
        *total += host::of_lane<N>(all, lane);
    }
    return before;
}
#else
template <class N>
SPEFT_DEVICE N sum_before_in_warp(N mine, N* total) {
    using Scan = ::cub::WarpScan<N>;
    typename Scan::TempStorage none;  // whole warps only shuffle
    N before;
    Scan(none).ExclusiveSum(mine, before, *total);
    return before;
}
#endif

}  // namespace cuda
}  // namespace speft
