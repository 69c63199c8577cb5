// The one door through which the kernels reach the hardware.
//
// gpu.h gives it the GPU's meaning, host/device.h that of fibers on a CPU: the same .cu files
// compile with nvcc for a GPU and with g++ for the tests. Both define, beside CUDA's own threadIdx,
// blockIdx, blockDim and gridDim:
//
//   SPEFT_KERNEL(threads, blocks)   before a kernel, instead of `__global__ void`: threads of a
//                               block and, where named, blocks that a multiprocessor shall hold
//   SPEFT_DEVICE                before a function that kernels call
//   SPEFT_BOTH                  before one that launchers call as well
//   SPEFT_UNROLL, SPEFT_UNROLL_BY(turns)    before a loop: all of its turns at once, or so many
//   launch(...)                 on a stream: returns 0, or a code for error_text()
//   launch_resident(...)        the same of as many blocks as all multiprocessors hold at once
//   device_error_text(code)
//   shared_memory<T>()          the block's dynamic shared memory, aligned to 16 bytes
//   SharedAt, shared_at(pointer)  a place in shared memory that takes one register, and bytes added
//                               to it; the operations below take it in a pointer's place
//   sync_block()                barrier of all threads of a block
//   sync_grid()                 of all threads of a grid, of launch_resident() only
//   exchange_from(value, lane)  warp shuffle of all 32 lanes, which orders nothing
//   lanes_with(mine)            a bit for each of a warp's 32 lanes that bring true
//   afresh(word), afresh(pointer)  the same; what is made of it is made where it stands, and not
//                               kept in registers from turn to turn
//   count_bits(bits), lowest_bit(bits), bit_cast<To>(from)
//   bytes_of(low, high, which)  four of the eight bytes of two words, each by a digit of `which`
//   masked(bits, mask, flip)    bits & mask ^ flip, in one instruction
//   add_pairs<T>(a, b), multiply_pairs<T>(a, b)  of two 16-bit numbers in a word, each rounded once
//   reaches(value, least)       1 where value >= least, else 0, in one instruction
//   atomic_add, atomic_min(pointer, value)      on shared and global memory; the former value
//   read_only(pointer)          what no one writes while the kernel runs: 2, 4 or 16 bytes
//   fence()                     between what this thread writes before and after it, for the device
//   load_shared16(words, shared), store16(global, words)  16 bytes at once
//   cp_async16(shared, global, valid), cp_async_commit(), cp_async_wait<N>()
//                               16 bytes to shared memory (zeros where not valid) in groups; waits
//                               until all but the latest N groups of this thread have arrived
//   ldmatrix_x4, ldmatrix_x4_trans, mma_m16n8k16<T>       fragments and products of a warp
//   widen(x), narrow<T>(x)      to and from the accumulator's type; rounds to nearest, ties to even
#pragma once

#include "../dtypes.h"
#include "kernels.h"

#ifdef SPEFT_ON_HOST
    #include "host/device.h"
#else
    #include "gpu.h"
#endif

namespace speft {
namespace cuda {

constexpr int kWarp = 32;

struct alignas(8) Bytes8 {
    uint32_t words[2];
};

// Two neighbouring sums of a product's result. Rows that are a multiple of 16 floats and kSumPad
// more apart put what 16 lanes store of them in different banks.
struct alignas(8) Pair {
    float first, second;
};
constexpr int kSumPad = 8;

struct alignas(16) Bytes16 {
    uint32_t words[4];
};

SPEFT_BOTH int64_t parts_of(int64_t whole, int64_t size) {
    return (whole + size - 1) / size;
}

SPEFT_DEVICE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

SPEFT_DEVICE int lane_id() {
    return int(threadIdx.x) % kWarp;
}

SPEFT_DEVICE int warp_id() {
    return int(threadIdx.x) / kWarp;
}

// Where a token of a stretch stands in shared memory, for stretches of 32. A lane that reads 16
// bytes of a line over the tokens has tokens 8 t to 8 t + 7, with t = lane % 4; matrices that
// ldmatrix turns, and operands of a product, want of it tokens 2 t and 2 t + 1 of one set of eight
// rows after the other. In this order each set is eight neighbouring rows.
SPEFT_DEVICE int place_of_token(int token) {
    return token / 32 * 32 + token / 2 % 4 * 8 + token / 8 % 4 * 2 + token % 2;
}

// Calls f with a null pointer of the element type, and returns what it returns.
template <class F>
int by_type(DType dtype, F&& f) {
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
    return kUnsupported;
}

}  // namespace cuda
}  // namespace speft
