// The CPU kernels. They trust their arguments: checking is done one floor up, in speft_kernels/ops.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace speft {

// Entries in CSR form over the rows and columns that hold any (speft_kernels/compact.py).
struct CompactIndices {
    const int32_t* rows;  // [num_rows]
    const int64_t* crow;  // [num_rows + 1]
    int64_t num_rows;
    const int32_t* cols;   // [num_cols]
    const int32_t* local;  // [nnz]: position of each entry's column in cols
    int64_t num_cols;
    int64_t nnz() const { return num_rows == 0 ? 0 : crow[num_rows]; }
};

// y[m, row_e] += sum over the row's entries of values[e] * x[m, col_e]
void sparse_delta_matmul(void* y, int64_t y_stride, const void* x, int64_t x_stride,
                         int64_t in_features, int64_t tokens, const CompactIndices& delta,
                         const void* values, DType dtype, int threads);

// The entries of a plan that sampled_grad computes here (speft_kernels/parts.py): positions among
// the used rows and columns, and the place of each entry among the values.
constexpr int64_t kTileSide = 16;
struct SampledEntries {
    const int32_t* rows;  // [num_rows]: the used rows of the weight
    int64_t num_rows;
    const int32_t* cols;  // [num_cols]: the columns of x, in the order of the packed ones
    int64_t num_cols;
    const int32_t* entry_rows;  // [num_entries], sorted
    const int32_t* entry_cols;  // [num_entries]
    const int32_t* slots;       // [num_entries], or null: entry e is value e
    int64_t num_entries;
    const int32_t* tile_rows;   // [num_tiles], sorted, in units of kTileSide
    const int32_t* tile_cols;   // [num_tiles]
    const int32_t* tile_slots;  // [num_tiles, kTileSide, kTileSide], -1 where nothing trains
    int64_t num_tiles;
};

// out[slot_e] (+)= sum over m of dy[m, row_e] * x[m, col_e]; the other values are left alone. x is
// [tokens, in_features], or packed by keep_columns with the same width.
void sampled_grad(const void* dy, int64_t dy_stride, int64_t out_features, const void* x,
                  int64_t x_stride, int64_t in_features, bool packed, int64_t tokens, int64_t width,
                  const SampledEntries& plan, void* out, bool accumulate, DType dtype, int threads);

// kept[b, c, t] = x[b * width + t, columns[c]]; width is a multiple of 16.
void keep_columns(const void* x, int64_t x_stride, int64_t in_features, int64_t tokens,
                  const int32_t* columns, int64_t num_columns, int64_t width, void* kept,
                  DType dtype, int threads);

// out[b] (+)= dy[:, rows_b]^T @ x[:, cols_b]
void block_grad(const void* dy, int64_t dy_stride, int64_t out_features, const void* x,
                int64_t x_stride, int64_t in_features, int64_t tokens, const int32_t* block_rows,
                const int32_t* block_cols, int64_t num_blocks, int64_t block_height,
                int64_t block_width, void* out, bool accumulate, DType dtype, int threads);

// The k largest scores of all matrices together: indices within each matrix, sorted, one matrix
// after the other, and how many fall to each. Returns -1, or the first matrix whose score is not
// finite. 0 < k <= sum of sizes.
int64_t topk_salience(const void* const* weights, const void* const* grads, const int64_t* sizes,
                      int64_t num_matrices, int64_t k, int metric, int64_t* indices,
                      int64_t* counts, DType dtype, int threads);

// weight[idx] = base + values, or base where values is null, for each of `count` weights. Indices
// are int32, or int64.
struct DeltaWrite {
    void* weight;
    const void* indices;
    bool wide_indices;
    int64_t nnz;
    const void* base;
    const void* values;
};
void write_delta(const DeltaWrite* deltas, int64_t count, DType dtype, int threads);

}  // namespace speft
