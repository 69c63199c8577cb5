// block_grad: dV[b] = dy[:, rows_b]^T @ x[:, cols_b], for 16-bit inputs, on the tensor cores.
//
// A thread block makes a tile of one block's gradient from one part of the tokens. Stretches of
// kStretch tokens come to shared memory in kStages stages, as dy and x have them: a token a row.
// Each of four warps takes 16 tokens of a stretch and keeps the whole tile, so that small tiles,
// too, keep four warps busy; their sums are added in order at the end, as are those of the parts of
// the tokens.
//
// Count (M tokens, blocks of h x w, E entries): reads 2 M (h + w) bytes a block, of which what
// shares rows or columns comes from L2, for 2 M h w operations: h w / (h + w) operations a byte, 8
// for 16 x 16 and 16 for 32 x 32, so the cache bounds it and not the tensor cores. One ldmatrix
// feeds two products of A's side and one of B's.
#include <algorithm>

#include "bring.h"
#include "device.h"
#include "kernels.h"
#include "tokens.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kDepth = 16;  // tokens of one product
constexpr int kStretch = kWarps * kDepth;
constexpr int kStages = 3;

template <int kRows, int kCols>
constexpr size_t kStageElements = size_t(kStretch) * (kRows + kCols);

template <int kRows, int kCols>
constexpr size_t kSharedBytes =
    std::max(kStages * kStageElements<kRows, kCols> * 2, size_t(kRows) * (kCols + kSumPad) * 4);

template <class T, int kRows, int kCols>
SPEFT_KERNEL(kThreads)
multiply(BlockGrad problem, bool dy_vectors, bool x_vectors) {
    constexpr int kRowTiles = kRows / 16, kColTiles = kCols / 8;
    using OfDy = Swizzled<kRows>;
    using OfX = Swizzled<kCols>;
    // In 32 bits, as large as the grid: 64 are divided by a hundred instructions.
    const unsigned tiles_down = unsigned(parts_of(problem.height, kRows));
    const unsigned tiles_across = unsigned(parts_of(problem.width, kCols));
    const int64_t block = blockIdx.x / (tiles_down * tiles_across);
    const unsigned tile = blockIdx.x % (tiles_down * tiles_across);
    const int64_t row = int64_t(tile / tiles_across) * kRows;
    const int64_t col = int64_t(tile % tiles_across) * kCols;
    const int rows = int(problem.height - row < kRows ? problem.height - row : kRows);
    const int cols = int(problem.width - col < kCols ? problem.width - col : kCols);

    const TokenPart part = part_of_tokens<kStretch>(problem.tokens, problem.splits, blockIdx.y);
    const int64_t begin = part.begin, end = part.end;
    const int turns = part.turns;

    const auto* const dy_columns =
        static_cast<const uint16_t*>(problem.dy) + problem.block_rows[block] * problem.height + row;
    const auto* const x_columns =
        static_cast<const uint16_t*>(problem.x) + problem.block_cols[block] * problem.width + col;
    const Chunks<kStretch, OfDy, kThreads, uint16_t> of_dy(problem.dy_stride, kStretch, rows);
    const Chunks<kStretch, OfX, kThreads, uint16_t> of_x(problem.x_stride, kStretch, cols);

    auto* const stages = shared_memory<uint16_t>();
    const auto stage = [&](int turn) {
        return stages + unsigned(turn) % kStages * unsigned(kStageElements<kRows, kCols>);
    };
    const auto fetch = [&](int turn) {
        if (turn < turns) {
            const int64_t start = begin + int64_t(turn) * kStretch;
            const uint16_t* const dy = dy_columns + start * problem.dy_stride;
            const uint16_t* const x = x_columns + start * problem.x_stride;
            uint16_t* const to = stage(turn) + kStretch * kRows;
            if (dy_vectors)
                of_dy.bring_rows(stage(turn), dy, end - start);
            else
                bring_singly<kStretch, OfDy, kThreads>(stage(turn), dy, problem.dy_stride,
                                                       end - start, rows);
            if (x_vectors)
                of_x.bring_rows(to, x, end - start);
            else
                bring_singly<kStretch, OfX, kThreads>(to, x, problem.x_stride, end - start, cols);
        }
        cp_async_commit();  // also an empty group: the waits below count groups
    };

    float sums[kRowTiles][kColTiles][4] = {};
    SPEFT_UNROLL
    for (int turn = 0; turn < kStages - 1; ++turn)
        fetch(turn);
    for (int turn = 0; turn < turns; ++turn) {
        cp_async_wait<kStages - 2>();
        sync_block();  // everyone's copies have arrived, and the stage that is fetched next is free
        fetch(turn + kStages - 1);
        // Lane l brings row l % 8 of the 8 x 8 matrix l / 8; matrices follow each other down k
        // first for x, and across first for dy, as the fragments of the product want them.
        const int depth = warp_id() * kDepth, lane = lane_id();
        const uint16_t* const dy = stage(turn);
        const uint16_t* const x = dy + kStretch * kRows;
        uint32_t left[kRowTiles][4];
        SPEFT_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
            ldmatrix_x4_trans(left[i], dy + OfDy::at(depth + lane / 16 * 8 + lane % 8,
                                                     lane / 8 % 2 * 8 + i * 16));
        SPEFT_UNROLL
        for (int j = 0; j < kColTiles; j += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(
                right, x + OfX::at(depth + lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8 + j * 8));
            SPEFT_UNROLL
            for (int i = 0; i < kRowTiles; ++i) {
                const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
                mma_m16n8k16<T>(sums[i][j], left[i], first);
                mma_m16n8k16<T>(sums[i][j + 1], left[i], second);
            }
        }
    }

    auto* const total = shared_memory<float>();
    for (int warp = 0; warp < kWarps; ++warp) {
        sync_block();  // the stages are read, or the warp before has added its part
        if (warp_id() != warp) continue;
        SPEFT_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
            SPEFT_UNROLL
        for (int j = 0; j < kColTiles; ++j)
            SPEFT_UNROLL
        for (int v = 0; v < 4; v += 2) {
            const int r = i * 16 + lane_id() / 4 + v / 2 * 8;
            auto& place =
                *reinterpret_cast<Pair*>(total + r * (kCols + kSumPad) + j * 8 + lane_id() % 4 * 2);
            Pair sum = {sums[i][j][v], sums[i][j][v + 1]};
            if (warp > 0) sum = {place.first + sum.first, place.second + sum.second};
            place = sum;
        }
    }
    sync_block();
    const int64_t size = problem.height * problem.width;
    float* const out = problem.splits == 1
                           ? problem.out
                           : problem.scratch + int64_t(blockIdx.y) * problem.num_blocks * size;
    const bool accumulate = problem.accumulate && problem.splits == 1;
    for (int i = int(threadIdx.x); i < rows * cols; i += kThreads) {
        const int r = i / cols, c = i % cols;
        float& place = out[block * size + (row + r) * problem.width + col + c];
        place = (accumulate ? place : 0.0f) + total[r * (kCols + kSumPad) + c];
    }
}

SPEFT_KERNEL(kThreads) add_parts(BlockGrad problem) {
    const int64_t count = problem.num_blocks * problem.height * problem.width;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    float sum = problem.accumulate ? problem.out[i] : 0.0f;
    for (int64_t split = 0; split < problem.splits; ++split)
        sum += problem.scratch[split * count + i];
    problem.out[i] = sum;
}

template <class T, int kRows, int kCols>
int multiply_tiles(const BlockGrad& problem, void* stream) {
    const int64_t tiles =
        parts_of(problem.height, kRows) * parts_of(problem.width, kCols) * problem.num_blocks;
    if (tiles > INT32_MAX || problem.splits > 65535) return kUnsupported;
    return launch(multiply<T, kRows, kCols>, dim3(unsigned(tiles), unsigned(problem.splits)),
                  kThreads, kSharedBytes<kRows, kCols>, stream, problem,
                  in_vectors<uint16_t>(problem.dy, problem.dy_stride, problem.height),
                  in_vectors<uint16_t>(problem.x, problem.x_stride, problem.width));
}

template <class T>
int multiply_blocks(const BlockGrad& problem, void* stream) {
    const bool thin = problem.height <= 16, narrow = problem.width <= 16;
    if (thin && narrow) return multiply_tiles<T, 16, 16>(problem, stream);
    if (thin) return multiply_tiles<T, 16, 64>(problem, stream);
    if (narrow) return multiply_tiles<T, 64, 16>(problem, stream);
    if (problem.height <= 32 && problem.width <= 32)
        return multiply_tiles<T, 32, 32>(problem, stream);
    return multiply_tiles<T, 64, 64>(problem, stream);
}

}  // namespace

int block_grad(const BlockGrad& problem, DType dtype, void* stream) {
    if (problem.num_blocks == 0) return 0;
    int error = kUnsupported;
    if (dtype == DType::kBFloat16) error = multiply_blocks<BFloat16>(problem, stream);
    if (dtype == DType::kFloat16) error = multiply_blocks<Float16>(problem, stream);
    if (error != 0 || problem.splits == 1) return error;
    const int64_t count = problem.num_blocks * problem.height * problem.width;
    return launch(add_parts, dim3(unsigned(parts_of(count, kThreads))), kThreads, 0, stream,
                  problem);
}

}  // namespace cuda
}  // namespace speft
