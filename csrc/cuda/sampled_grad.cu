// sampled_grad: dv[e] = sum over tokens of dy[m, row(e)] * x[m, col(e)], for 16-bit inputs, on the
// tensor cores.
//
// A product of 16 rows by 8 columns needs no neighbouring columns: its right operand is any eight
// lines of x. Eight thin strips (a column under kStripRows rows) of the same rows make one,
// wherever their columns are. A thread block takes a tile of the strips of one block of rows and a
// part of the tokens. kStretch tokens at a time come to shared memory in kStages asynchronous
// stages: of dy all rows of the block, as it lies, neither sought out nor turned beforehand; of x
// the lines of the tile, each once for all its strips. From there the warps gather. The entries'
// sums are picked from the accumulators at the end. A lane's 16 bytes of a line are its part of two
// right operands; that puts tokens into a product in another order than they have, which dy takes
// on as it arrives (place_of_token).
//
// Count (M tokens, L lines of x over all tiles, S strips in whole groups): from L2 2 M L bytes of x
// and 512 M of dy a tile; dy once from memory. Shared memory takes what L2 gives, and gives 2 M S
// bytes of lines, a tenth more where two that are read at once lie in the same banks, and 64 M of
// dy for each warp and each rows that its groups have. 64 M S operations. A warp issues 75
// instructions a stretch, 11.5 for each group and 12 more where its rows change: four of them are
// products. Where its groups are read it keeps in five registers (Groups), which it unpacks as it
// goes, for in more there would be no room.
//
// Arithmetic, not measured, for an H200 (7 TB/s of L2, 29.6 TB/s of shared memory, 600 TFLOP/s of
// mma.sync, four instructions a cycle at 1.755 GHz), M = 8192, N = K = 4096; beside it the strips
// of triton_kernels/sampled_grad.py by that file's count. Reading dy from memory takes 16 us.
//
//                    tiles  L       S       L2               shared  products  issue  strips there
//   realistic 0.1 %  16     3,001   12,624  116 MB, 17 us    18 us   11 us     11 us  29 us
//   realistic 0.5 %  48     12,512  41,232  406 MB, 58 us    57 us   36 us     33 us  77 us
//   uniform 0.1 %    32     14,783  17,432  376 MB, 54 us    35 us   15 us     18 us  55 us
//   uniform 0.5 %    96     47,485  80,592  1181 MB, 169 us  125 us  70 us     66 us  218 us
#include <algorithm>

#include "bring.h"
#include "device.h"
#include "kernels.h"
#include "tokens.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kGroup = 8;                      // strips of one product
constexpr int kGroups = kTileGroups / kWarps;  // of a warp
constexpr int kRowTiles = kStripRows / 16;
constexpr int kBlockRows = kStripRows * kBlockStrips;
constexpr int kStretch = 32;  // tokens of two products: four lanes' 16 bytes of a line
constexpr int kStages = 3;
constexpr int kVector = 8;                    // elements of 16 bytes
constexpr int kPitch = kBlockRows + kVector;  // puts eight tokens of dy in all banks
constexpr int kDyBytes = kStretch * kPitch * int(sizeof(uint16_t));
constexpr int kLineBytes = kStretch * int(sizeof(uint16_t));
constexpr int kStageBytes = kDyBytes + kTileLines * kLineBytes;
// What is picked from at the end takes the stages' place, a row of the strips a line.
constexpr int kStrips = kTileGroups * kGroup;
constexpr int kSumPitch = kStrips + kSumPad;
constexpr size_t kSharedBytes =
    std::max(size_t(kStages * kStageBytes), kStripRows * kSumPitch * sizeof(float));
static_assert(kSharedBytes <= 163 * 1024, "what sm_80 has");

// A stretch of a block's rows of dy, where products want its tokens.
struct DyLayout {
    static constexpr int kColumns = kBlockRows;
    SPEFT_DEVICE static int at(int token, int column) {
        return place_of_token(token) * kPitch + column;
    }
};

// The groups of a warp, kGroups or fewer, in few registers: read from shared memory each turn, they
// would be a tenth of all that is.
struct Groups {
    static constexpr int kRowBits = 3, kRowBytes = kStripRows * int(sizeof(uint16_t));
    static_assert(kBlockStrips <= 1 << kRowBits && kGroups * (kRowBits + 1) <= 32, "one register");

    uint32_t lines[kGroups / 2];  // where in a stage this lane reads of each: 16 bits, in bytes
    uint32_t rows;  // of each; above, a bit where they are others than those before, or none

    SPEFT_DEVICE Groups(const SampledGrad& problem, int first, int count) : rows(0) {
        uint32_t before = ~0u;
        SPEFT_UNROLL
        for (int j = 0; j < kGroups; ++j) {
            const bool there = j < count;
            const int64_t group = first + j;
            const uint32_t line =
                there ? uint16_t(problem.strip_line[group * kGroup + lane_id() / 4]) : 0u;
            const uint32_t of = there ? problem.group_rows[group] : 0u;
            const uint32_t bytes = line * kLineBytes;
            lines[j / 2] = j % 2 ? lines[j / 2] | bytes << 16 : bytes;
            rows |= of << (kRowBits * j);
            if (!there || of != before) rows |= mark(j);
            before = of;
        }
    }

    SPEFT_DEVICE static uint32_t mark(int j) { return 1u << (kGroups * kRowBits + j); }

    // Once a turn, that nothing unpacked outlives it.
    SPEFT_DEVICE void unpack_afresh() {
        rows = afresh(rows);
        SPEFT_UNROLL
        for (uint32_t& two : lines)
            two = afresh(two);
    }

    // Whether group j is of the same rows as the one before it.
    SPEFT_DEVICE bool goes_on(int j) const { return (rows & mark(j)) == 0; }
    SPEFT_DEVICE uint32_t row_at(int j) const {
        return (rows >> (kRowBits * j)) % (1u << kRowBits) * kRowBytes;
    }
    SPEFT_DEVICE uint32_t line_at(int j) const {
        return j % 2 ? lines[j / 2] >> 16 : lines[j / 2] & 0xffff;
    }
};
static_assert(kTileLines * kLineBytes <= 1 << 16, "where a line is has 16 bits");

template <class T>
SPEFT_KERNEL(kThreads)
multiply_strips(SampledGrad problem, bool vectors) {
    const int64_t tile = blockIdx.x;
    const int64_t row = int64_t(problem.tile_block[tile]) * kBlockRows;
    const TokenPart part = part_of_tokens<kStretch>(problem.tokens, problem.splits, blockIdx.y);
    const int tokens = int(part.end - part.begin), lane = lane_id(), chunk = lane % 4 * kVector;

    // Four threads bring a stretch of a line, the same ones each time. Lines are aligned: where one
    // starts counts its vectors, so that 32 bits do.
    constexpr int kCopies = kTileLines * 4 / kThreads;
    const int lines =
        problem.tile_lines[tile + 1] - problem.tile_lines[tile] - int(threadIdx.x) / 4;
    const uint32_t line_vectors = uint32_t(problem.x_stride / kVector);
    uint32_t starts[kCopies];
    SPEFT_UNROLL
    for (int i = 0; i < kCopies; ++i) {
        const int line = problem.tile_lines[tile] + (i * kThreads + int(threadIdx.x)) / 4;
        starts[i] = i * kThreads / 4 < lines ? uint32_t(problem.line[line]) * line_vectors : 0u;
    }
    // Of dy, a warp brings two tokens: of columns beyond the last, whose sums no one reads, the
    // first ones of the block. `of_dy` and `of_x` are where the next stretch is.
    const int64_t stride = problem.dy_stride, wide = problem.out_features - row;
    const auto* const dy = static_cast<const uint16_t*>(problem.dy) + row;
    const auto* of_dy =
        dy + (part.begin + warp_id()) * stride + (lane * kVector < wide ? lane * kVector : 0);
    const auto* of_x = static_cast<const uint16_t*>(problem.x) + part.begin + chunk;
    const SharedAt stages = shared_at(shared_memory<unsigned char>());
    const int dy_to = DyLayout::at(warp_id(), lane * kVector) * int(sizeof(uint16_t));
    const int x_to = kDyBytes + int(threadIdx.x) * 16;
    // Brings the next stretch, of which so many tokens are left.
    const auto fetch = [&](int stage, int left) {
        if (left > 0) {
            if (!vectors)
                bring_singly<kStretch, DyLayout, kThreads>(shared_memory<uint16_t>() + stage / 2,
                                                           dy + (part.end - left) * stride, stride,
                                                           left, wide);
            SPEFT_UNROLL
            for (int i = 0; i < kStretch / kWarps; ++i) {
                // Places of tokens are their bits in another order.
                const SharedAt to =
                    stages + stage + dy_to + DyLayout::at(i * kWarps, 0) * int(sizeof(uint16_t));
                if (vectors)
                    cp_async16(to, of_dy + i * kWarps * stride, warp_id() + i * kWarps < left);
            }
            SPEFT_UNROLL
            for (int i = 0; i < kCopies; ++i)
                if (i * kThreads / 4 < lines)
                    cp_async16(stages + stage + x_to + i * kThreads * 16,
                               of_x + uint64_t(afresh(starts[i])) * kVector, chunk < left);
            of_dy += kStretch * stride;
            of_x += kStretch;
        }
        cp_async_commit();  // also an empty group: the waits below count groups
    };
    SPEFT_UNROLL
    for (int turn = 0; turn < kStages - 1; ++turn)
        fetch(turn * kStageBytes, tokens - turn * kStretch);

    // A warp takes neighbouring groups, so that most of them are of the same rows.
    const int first = problem.tile_groups[tile], groups = problem.tile_groups[tile + 1] - first;
    const int each = (groups + kWarps - 1) / kWarps, mine = warp_id() * each;
    const int own = groups - mine < each ? groups - mine : each;
    Groups of_warp(problem, first + mine, own);

    float sums[kGroups][kRowTiles][4] = {};
    const int rows_from =
        ((lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8) * int(sizeof(uint16_t));
    int stage = 0, free = (kStages - 1) * kStageBytes;
    for (int left = tokens; left > 0; left -= kStretch) {
        cp_async_wait<kStages - 2>();
        sync_block();  // everyone's copies have arrived, and the stage that is fetched next is free
        fetch(free, left - (kStages - 1) * kStretch);
        // Lane l brings row l % 8 of the 8 x 8 matrix l / 8; those follow each other across first.
        const SharedAt rows = stages + stage + rows_from;
        const SharedAt line = stages + stage + kDyBytes + lane % 4 * 16;
        of_warp.unpack_afresh();
        uint32_t left_side[2][kRowTiles][4], right[2][4];
        const auto load_rows = [&](int j) {
            SPEFT_UNROLL
            for (int i = 0; i < 2 * kRowTiles; ++i)
                ldmatrix_x4_trans(
                    left_side[i / kRowTiles][i % kRowTiles],
                    rows + of_warp.row_at(j) +
                        (i / kRowTiles * 16 * kPitch + i % kRowTiles * 16) * int(sizeof(uint16_t)));
        };
        const auto gather = [&](int j) { load_shared16(right[j % 2], line + of_warp.line_at(j)); };
        const auto multiply = [&](int j) {
            SPEFT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint32_t strips[2] = {right[j % 2][2 * half], right[j % 2][2 * half + 1]};
                SPEFT_UNROLL
                for (int i = 0; i < kRowTiles; ++i)
                    mma_m16n8k16<T>(sums[j][i], left_side[half][i], strips);
            }
        };
        if (own > 0) {
            gather(0);
            load_rows(0);
        }
        SPEFT_UNROLL
        for (int j = 0; j < kGroups; ++j) {
            // Mostly neither is j the last nor the next of other rows: one question for both.
            if (j + 1 < kGroups && of_warp.goes_on(j + 1)) {
                gather(j + 1);
                multiply(j);
                continue;
            }
            if (j >= own) break;
            if (j + 1 < own) gather(j + 1);
            multiply(j);
            if (j + 1 >= own) break;
            load_rows(j + 1);
        }
        free = stage;
        stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
    }

    sync_block();  // the stages are read
    auto* const total = shared_memory<float>();
    SPEFT_UNROLL
    for (int j = 0; j < kGroups; ++j)
        SPEFT_UNROLL
    for (int i = 0; i < kRowTiles; ++i)
        SPEFT_UNROLL
    for (int v = 0; v < 4; v += 2) {
        if (j >= own) continue;
        const int strip = (mine + j) * kGroup + lane % 4 * 2, r = i * 16 + v / 2 * 8 + lane / 4;
        *reinterpret_cast<Pair*>(total + r * kSumPitch + strip) = {sums[j][i][v],
                                                                   sums[j][i][v + 1]};
    }
    sync_block();
    const int last = problem.tile_entries[tile + 1];
    for (int e = problem.tile_entries[tile] + int(threadIdx.x); e < last; e += kThreads) {
        const float sum = total[uint16_t(problem.at[e]) % kStripRows * kSumPitch +
                                uint16_t(problem.at[e]) / kStripRows];
        if (problem.splits == 1) {
            float& to = problem.out[problem.slot[e]];
            to = problem.accumulate ? to + sum : sum;
        } else {
            problem.scratch[blockIdx.y * problem.nnz + e] = sum;
        }
    }
}

SPEFT_KERNEL(kThreads) place_sums(SampledGrad problem) {
    const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (e >= problem.nnz) return;
    float& to = problem.out[problem.slot[e]];
    float sum = problem.accumulate ? to : 0.0f;
    for (int64_t split = 0; split < problem.splits; ++split)
        sum += problem.scratch[split * problem.nnz + e];
    to = sum;
}

template <class T>
int multiply_tiles(const SampledGrad& problem, void* stream) {
    // Whether dy may be read 16 bytes at a time: of every token and every block, whole.
    const bool vectors = reinterpret_cast<uintptr_t>(problem.dy) % 16 == 0 &&
                         problem.dy_stride % kVector == 0 && problem.out_features % kVector == 0;
    return launch(multiply_strips<T>, dim3(unsigned(problem.tiles), unsigned(problem.splits)),
                  kThreads, kSharedBytes, stream, problem, vectors);
}

}  // namespace

int sampled_grad(const SampledGrad& problem, DType dtype, void* stream) {
    if (problem.nnz == 0) return 0;
    if (problem.tiles > INT32_MAX || problem.splits > 65535) return kUnsupported;
    int error = kUnsupported;
    if (dtype == DType::kBFloat16) error = multiply_tiles<BFloat16>(problem, stream);
    if (dtype == DType::kFloat16) error = multiply_tiles<Float16>(problem, stream);
    if (error != 0 || problem.splits == 1) return error;
    return launch(place_sums, dim3(unsigned(parts_of(problem.nnz, kThreads))), kThreads, 0, stream,
                  problem);
}

}  // namespace cuda
}  // namespace speft
