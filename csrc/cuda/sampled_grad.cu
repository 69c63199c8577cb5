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
// bytes of lines, a tenth more where two that are read at once lie in the same banks, 0.5 M S of
// places, and 64 M of dy for each warp and each rows that its groups have. 64 M S operations.
//
// Arithmetic, not measured, for an H200 (7 TB/s of L2, 29.6 TB/s of shared memory, 600 TFLOP/s of
// mma.sync), M = 8192, N = K = 4096; beside it the strips of triton_kernels/sampled_grad.py by that
// file's count. Reading dy from memory takes 16 us.
//
//                     tiles   L        S        L2               shared   products   strips there
//   realistic 0.1 %   16      3,001    12,624   116 MB, 17 us    19 us    11 us      29 us
//   realistic 0.5 %   51      12,512   41,296   419 MB, 60 us    64 us    36 us      77 us
//   uniform 0.1 %     32      14,783   17,376   376 MB, 54 us    37 us    15 us      55 us
//   uniform 0.5 %     112     47,485   81,096   1248 MB, 178 us  146 us   71 us      218 us
#include <algorithm>

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
constexpr int kStageElements = kStretch * (kPitch + kTileLines);
// What is picked from at the end takes the stages' place, a row of the strips a line.
constexpr int kStrips = kTileGroups * kGroup;
constexpr int kSumPitch = kStrips + kSumPad;
constexpr size_t kSharedBytes =
    std::max(kStages * kStageElements * sizeof(uint16_t) + kStrips * sizeof(uint32_t),
             kStripRows * kSumPitch * sizeof(float));
static_assert(kSharedBytes <= 163 * 1024, "what sm_80 has");

// A stretch of dy's columns [row, row + kBlockRows), a token a warp at a time. Where a thread reads
// and writes stays the same, as in Chunks of bring.h.
class OfDy {
    static constexpr int kEach = kStretch / kWarps;  // tokens of a warp
    static_assert(kBlockRows == kWarp * kVector, "a warp brings a token");

  public:
    SPEFT_DEVICE OfDy(const SampledGrad& problem, int64_t row)
        : stride_(problem.dy_stride), column_(lane_id() * kVector) {
        const int64_t left = problem.out_features - row;
        real_ = left < kBlockRows ? int(left) : kBlockRows;
        from_ = static_cast<const uint16_t*>(problem.dy) + warp_id() * stride_ + row;
    }

    // Brings the stretch that starts at token `start`; zeros from token `end` on. Of columns beyond
    // the last, whose sums no one reads, the first ones of the block.
    SPEFT_DEVICE void bring(uint16_t* stage, int64_t start, int64_t end, bool vectors) const {
        const uint16_t* const from = from_ + start * stride_;
        const int left = int(end - start < kStretch ? end - start : kStretch) - warp_id();
        SPEFT_UNROLL
        for (int i = 0; i < kEach; ++i) {
            uint16_t* const to = stage + place_of_token(warp_id() + i * kWarps) * kPitch + column_;
            const uint16_t* const token = from + i * kWarps * stride_;
            if (vectors) {
                cp_async16(to, token + (column_ < real_ ? column_ : 0), i * kWarps < left);
                continue;
            }
            for (int c = 0; c < kVector; ++c)
                to[c] = i * kWarps < left && column_ + c < real_ ? token[column_ + c] : uint16_t(0);
        }
    }

  private:
    const uint16_t* from_;
    int64_t stride_;
    int column_, real_;
};

template <class T>
SPEFT_KERNEL(kThreads)
multiply_strips(SampledGrad problem, bool vectors) {
    const int64_t tile = blockIdx.x;
    const int64_t row = int64_t(problem.tile_block[tile]) * kBlockRows;
    const TokenPart part = part_of_tokens<kStretch>(problem.tokens, problem.splits, blockIdx.y);
    const int64_t begin = part.begin, end = part.end;
    const int turns = part.turns;
    const int lane = lane_id(), chunk = lane % 4 * kVector;

    // Four threads bring a stretch of a line, the same ones each time. Lines are aligned: where one
    // starts counts its vectors, so that 32 bits do.
    constexpr int kCopies = kTileLines * 4 / kThreads;
    constexpr uint32_t kNoLine = ~0u;
    const int lines = problem.tile_lines[tile + 1] - problem.tile_lines[tile];
    const uint32_t line_vectors = uint32_t(problem.x_stride / kVector);
    uint32_t starts[kCopies];
    SPEFT_UNROLL
    for (int i = 0; i < kCopies; ++i) {
        const int line = (i * kThreads + int(threadIdx.x)) / 4;
        starts[i] = line < lines
                        ? uint32_t(problem.line[problem.tile_lines[tile] + line]) * line_vectors
                        : kNoLine;
    }
    const OfDy of_dy(problem, row);
    auto* const stages = shared_memory<uint16_t>();
    const auto stage = [&](int turn) { return stages + turn % kStages * kStageElements; };
    const auto fetch = [&](int turn) {
        if (turn < turns) {
            const int64_t start = begin + int64_t(turn) * kStretch;
            of_dy.bring(stage(turn), start, end, vectors);
            uint16_t* const to = stage(turn) + kStretch * kPitch + threadIdx.x * kVector;
            const auto* const from = static_cast<const uint16_t*>(problem.x) + start + chunk;
            SPEFT_UNROLL
            for (int i = 0; i < kCopies; ++i)
                if (starts[i] != kNoLine)
                    cp_async16(to + i * kThreads * kVector, from + uint64_t(starts[i]) * kVector,
                               start + chunk < end);
        }
        cp_async_commit();  // also an empty group: the waits below count groups
    };

    // Of each strip of the tile where it reads: a line in a stage, and rows of dy. In shared
    // memory, for in registers a warp would need two numbers a group.
    const int first = problem.tile_groups[tile];
    const int groups = problem.tile_groups[tile + 1] - first;
    auto* const places = reinterpret_cast<uint32_t*>(stages + kStages * kStageElements);
    for (int i = int(threadIdx.x); i < groups * kGroup; i += kThreads) {
        const uint32_t line = problem.strip_line[int64_t(first) * kGroup + i];
        const uint32_t rows = problem.group_rows[first + i / kGroup];
        places[i] = rows * kStripRows << 16 | line * kStretch;
    }
    // A warp takes neighbouring groups, so that most of them are of the same rows.
    const int each = (groups + kWarps - 1) / kWarps, mine = warp_id() * each;
    const int own = groups - mine < each ? groups - mine : each;

    float sums[kGroups][kRowTiles][4] = {};
    SPEFT_UNROLL
    for (int turn = 0; turn < kStages - 1; ++turn)
        fetch(turn);
    for (int turn = 0; turn < turns; ++turn) {
        cp_async_wait<kStages - 2>();
        sync_block();  // everyone's copies have arrived, and the stage that is fetched next is free
        fetch(turn + kStages - 1);
        // Lane l brings row l % 8 of the 8 x 8 matrix l / 8; those follow each other across first.
        const uint16_t* const dy =
            stage(turn) + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
        const uint16_t* const x = stage(turn) + kStretch * kPitch + chunk;
        const auto gather = [&](int j, uint32_t (&line)[4]) {
            const uint32_t place = places[(mine + j) * kGroup + lane / 4];
            load_shared16(line, x + (place & 0xffff));
            return int(place >> 16);
        };
        uint32_t left[2][kRowTiles][4], right[4], next[4];
        int rows = -1, next_rows = own > 0 ? gather(0, next) : 0;
        SPEFT_UNROLL
        for (int j = 0; j < kGroups; ++j) {
            if (j >= own) break;
            SPEFT_UNROLL
            for (int i = 0; i < 4; ++i)
                right[i] = next[i];
            if (rows != next_rows) {
                rows = next_rows;
                SPEFT_UNROLL
                for (int i = 0; i < 2 * kRowTiles; ++i)
                    ldmatrix_x4_trans(left[i / kRowTiles][i % kRowTiles],
                                      dy + i / kRowTiles * 16 * kPitch + rows + i % kRowTiles * 16);
            }
            if (j + 1 < own) next_rows = gather(j + 1, next);
            const uint32_t early[2] = {right[0], right[1]}, late[2] = {right[2], right[3]};
            SPEFT_UNROLL
            for (int i = 0; i < kRowTiles; ++i) {
                mma_m16n8k16<T>(sums[j][i], left[0][i], early);
                mma_m16n8k16<T>(sums[j][i], left[1][i], late);
            }
        }
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
        const float sum =
            total[problem.at[e] % kStripRows * kSumPitch + problem.at[e] / kStripRows];
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
    return launch(place_sums, dim3(unsigned((problem.nnz + kThreads - 1) / kThreads)), kThreads, 0,
                  stream, problem);
}

}  // namespace cuda
}  // namespace speft
