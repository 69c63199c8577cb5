// keep_columns: some columns of a matrix of 16-bit elements, turned into lines over the tokens.
//
// A thread block turns 64 tokens of 64 columns: single elements in, since the columns are any, each
// warp along a token; in shared memory ldmatrix turns them in squares of 8 x 8; 16 bytes out, 128
// of a line by each warp.
//
// Count (M tokens, C of K columns): reads the 32-byte sectors of x that hold a used column, 2 M K
// bytes at most and nearly so for real masks, and writes 2 M C. M = 8192, K = 4096, C = 983: 67 +
// 16 MB. There is no arithmetic.
#include "device.h"
#include "kernels.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSide = 64;
constexpr int kVector = 8;               // elements of 16 bytes
constexpr int kPitch = kSide + kVector;  // puts eight rows, as ldmatrix reads them, in all banks
constexpr int kAtOnce = kThreads / kSide;
constexpr int kEach = kSide / kAtOnce;  // elements of a thread: as many reads in flight

SPEFT_KERNEL(kThreads) turn_columns(KeepColumns problem) {
    const int64_t start = int64_t(blockIdx.x) * kSide, left = int64_t(blockIdx.y) * kSide;
    const int64_t first = int64_t(blockIdx.z) * problem.block_tokens;  // token of the packed block
    auto* const tile = shared_memory<uint16_t>();

    // A thread has every kAtOnce-th token of one column. Where the first is and how many there are
    // is found once, in 32 bits: found anew, it is more instructions than reading takes time for.
    const int column = int(threadIdx.x) % kSide, token = int(threadIdx.x) / kSide;
    const bool present = left + column < problem.width;
    const int64_t end = smaller(problem.block_tokens, problem.tokens - first);
    const int real = present && start < end ? int(smaller(kSide, end - start)) - token : 0;
    const auto* x = static_cast<const uint16_t*>(problem.x) +
                    (first + start + token) * problem.stride +
                    (present ? problem.columns[left + column] : 0);
    uint16_t found[kEach];
    SPEFT_UNROLL
    for (int i = 0; i < kEach; ++i) {
        found[i] = i * kAtOnce < real ? *x : uint16_t(0);
        x += kAtOnce * problem.stride;
    }
    // Places of tokens are their bits in another order.
    uint16_t* const to = tile + place_of_token(token) * kPitch + column;
    SPEFT_UNROLL
    for (int i = 0; i < kEach; ++i)
        to[place_of_token(i * kAtOnce) * kPitch] = found[i];
    sync_block();

    const int lane = lane_id();
    const int64_t c = left + warp_id() * kVector + lane / 4;
    auto* const line = static_cast<uint16_t*>(problem.kept) +
                       (blockIdx.z * problem.width + c) * problem.block_tokens;
    SPEFT_UNROLL
    for (int half = 0; half < kSide; half += 32) {
        uint32_t tokens[4];
        ldmatrix_x4_trans(tokens, tile + (half + lane) * kPitch + warp_id() * kVector);
        const int64_t t = start + half + lane % 4 * kVector;
        if (c < problem.width && t < problem.block_tokens) store16(line + t, tokens);
    }
}

}  // namespace

int keep_columns(const KeepColumns& problem, void* stream) {
    const int64_t down = parts_of(problem.block_tokens, kSide);
    const int64_t across = parts_of(problem.width, kSide);
    if (problem.block_tokens % kVector != 0 || down > INT32_MAX || across > 65535 ||
        problem.blocks > 65535)
        return kUnsupported;
    return launch(turn_columns, dim3(unsigned(down), unsigned(across), unsigned(problem.blocks)),
                  kThreads, kSide * kPitch * sizeof(uint16_t), stream, problem);
}

}  // namespace cuda
}  // namespace speft
