// The CUDA kernels' launchers. They trust their arguments: checking is done one floor up, in
// speft_kernels/ops. Each launches on `stream` of `device`, waits for nothing, allocates nothing,
// and returns 0, kUnsupported, or the device's code, of which error_text() knows the meaning.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace speft {
namespace cuda {

struct Place {
    int device;
    void* stream;
};

// No kernel serves these sizes or this dtype.
constexpr int kUnsupported = -1;

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
int write_delta(const DeltaWrite* deltas, int64_t count, DType dtype, Place place);

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
int block_grad(const BlockGrad& problem, DType dtype, Place place);

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
int keep_columns(const KeepColumns& problem, Place place);

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
int sampled_grad(const SampledGrad& problem, DType dtype, Place place);

}  // namespace cuda
}  // namespace speft
