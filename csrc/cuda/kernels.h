// The CUDA kernels' launchers. They trust their arguments: checking is done one floor up, in
// speft_kernels/ops, which also makes the tensors' device the current one. Each launches on
// `stream` of that device, waits for nothing, allocates nothing, and returns 0, one of the codes
// below, or the device's, of which error_text() knows the meaning.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtypes.h"

namespace speft {
namespace cuda {

// No kernel serves these sizes or this dtype.
constexpr int kUnsupported = -1;
// The device has less shared memory than a block of the kernel takes.
constexpr int kTooLittleShared = -2;

const char* error_text(int code);

// weight[idx] = base + values, or base where values is null, for each of `count` weights. Indices
// are int32, or int64.
struct DeltaWrite {
    void* weight;
    const void* indices;
    const void* base;
    const void* values;
    int64_t nnz;
    bool wide_indices;
};
int write_delta(const DeltaWrite* deltas, int64_t count, DType dtype, void* stream);

// out[b] (+)= dy[:, rows_b]^T @ x[:, cols_b], the tokens in `splits` parts whose sums stand in
// scratch [splits, num_blocks, height, width] until they are added in order; null for one part.
struct BlockGrad {
    const void* dy;
    int64_t dy_stride;
    const void* x;
    int64_t x_stride;
    int64_t tokens;
    const int32_t* block_rows;  // [num_blocks], in units of blocks
    const int32_t* block_cols;
    int64_t num_blocks;
    int64_t height, width;
    float* out;
    bool accumulate;
    float* scratch;
    int64_t splits;
};
int block_grad(const BlockGrad& problem, DType dtype, void* stream);

constexpr int kFewTokens = 32;

// What a sparse delta is added to: a matrix of x's dtype, int8, int16 words of four bits each
// (speft_kernels/quantized.py says which columns a word holds), or nothing.
enum class Base : int { kNone = 0, kPlain = 1, kInt8 = 2, kInt4 = 3 };

// y = x @ (W + D)^T + bias, or y = x @ (W + D) for the twin, without a bias.
struct DeltaProduct {
    const void* x;  // [tokens, cols], or [tokens, rows] for the twin
    int64_t x_stride;
    int64_t tokens;
    const void* weight;  // [rows, cols], or words [rows, cols / 4]; null without a base
    int64_t weight_stride;
    int64_t rows, cols;
    const void* scales;  // [rows, groups], float32 where wide, else of x's dtype
    bool wide_scales;
    int64_t group, groups;  // columns that share a scale, and how many of these a row has
    const void* bias;       // [rows], or null
    // D by tiles (speft_kernels/tiles.py).
    const int32_t* starts;
    const uint16_t* places;
    // The value of entry e is values[order[e]], or values[e] where order is null: as many tokens
    // want it, for which a kernel of its own sorts them. Up to kFewTokens need the order.
    const int32_t* order;
    const float* values;
    void* y;  // contiguous
    // Of the device; and the tokens of a tile, 256 or 128, or 0 for those that the count chooses.
    // The result depends on neither in any bit.
    int64_t multiprocessors;
    int64_t tile_tokens;
};
int sparse_delta_matmul(const DeltaProduct& product, Base base, bool twin, DType dtype,
                        void* stream);

// The k largest scores of each matrix, or of all together, in steps: a plan on the host, whose
// table the caller brings to the device beside a scratch of the plan's size; the launches; and
// where they have told of fewer indices than were asked for, the launches over the data.
struct TopkProblem {
    std::vector<const void*> x;  // the matrices, contiguous
    std::vector<const void*> y;  // their factors in the score; empty where it has one operand
    std::vector<int64_t> sizes;
    std::vector<int64_t> ks;  // a matrix, or one for all together; each at least 1
    bool together;
    DType dtype;
    int64_t multiprocessors;
};
struct TopkSizes {
    int64_t matrices, segments, tiles, most_tiles, groups, supers, list_parts, sample_bits, room;
    int64_t multiprocessors;
    bool together;
};
struct TopkPlan {
    TopkSizes sizes;
    std::vector<char> table;
    int64_t scratch_bytes;
};
TopkPlan plan_topk(const TopkProblem& problem);

struct TopkCall {
    const void* table;
    void* scratch;
    int metric;
    int64_t* indices;  // [sum of ks], within their matrix, sorted; matrix after matrix
    uint64_t* told;    // [1 + matrices]: the first matrix with a NaN or infinite score, all ones
                       // where there is none; how many indices each matrix has
    int64_t pending;   // segments that the call before, with this scratch, has told no index of
    bool resident;     // whether lists are selected from in one launch of blocks that stay
};
int topk_salience(const TopkSizes& sizes, const TopkCall& call, DType dtype, void* stream);

// kept[b, c, t] = x[b * block_tokens + t, columns[c]], zero where there is no such token; 16-bit
// elements, block_tokens a multiple of 8, kept aligned to 16 bytes.
struct KeepColumns {
    const void* x;
    int64_t stride;
    int64_t tokens;
    const int32_t* columns;
    int64_t width;
    int64_t block_tokens;
    int64_t blocks;
    void* kept;
};
int keep_columns(const KeepColumns& problem, void* stream);

// out[slot[e]] (+)= sum over tokens of dy[m, row(e)] * x[line(e), m], the entries as tiles of thin
// strips, which speft_kernels/thin_strips.py describes. The tokens are summed in `splits` parts,
// which stand in scratch [splits, nnz] until they are added in order; null for one part.
constexpr int kStripRows = 32;
constexpr int kBlockStrips = 8;
constexpr int kTileLines = 512;
constexpr int kTileGroups = 128;
struct SampledGrad {
    const void* dy;
    int64_t dy_stride;
    int64_t out_features;
    const void* x;  // lines over the tokens, aligned to 16 bytes, zero up to a multiple of 8 tokens
    int64_t x_stride;
    int64_t tokens;
    const int32_t* tile_block;  // [tiles]
    const int32_t* tile_lines;  // [tiles + 1], as the next two
    const int32_t* tile_groups;
    const int32_t* tile_entries;
    int64_t tiles;
    const int32_t* line;
    const uint8_t* group_rows;
    const int16_t* strip_line;  // [groups, 8]
    const int16_t* at;          // [nnz]
    const int32_t* slot;        // [nnz]
    int64_t nnz;
    float* out;
    bool accumulate;
    float* scratch;
    int64_t splits;
};
int sampled_grad(const SampledGrad& problem, DType dtype, void* stream);

}  // namespace cuda
}  // namespace speft
