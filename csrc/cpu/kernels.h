// The CPU kernels. They trust their arguments: checking is done one floor up, in speft_kernels/ops.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace speft {

// Entries in CSR form over the rows and columns that hold any (speft_kernels/plan.py).
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
void sparse_delta_matmul(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t tokens,
                         const CompactIndices& delta, const void* values, DType dtype, int threads);

// out[e] (+)= sum over m of dy[m, row_e] * x[m, col_e]
void sampled_grad(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                  int64_t tokens, const CompactIndices& pattern, void* out, bool accumulate,
                  DType dtype, int threads);

// out[b] (+)= dy[:, rows_b]^T @ x[:, cols_b]
void block_grad(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, int64_t tokens,
                const int32_t* block_rows, const int32_t* block_cols, int64_t num_blocks,
                int64_t block_height, int64_t block_width, void* out, bool accumulate, DType dtype,
                int threads);

// The k largest scores of all matrices together: indices within each matrix, sorted, one matrix
// after the other, and how many fall to each. Returns -1, or the first matrix whose score is not
// finite. 0 < k <= sum of sizes.
int64_t topk_salience(const void* const* weights, const void* const* grads, const int64_t* sizes,
                      int64_t num_matrices, int64_t k, int metric, int64_t* indices,
                      int64_t* counts, DType dtype, int threads);

// weight[idx] = base + values, or base where values is null. Indices are int32, or int64.
void write_delta(void* weight, const void* indices, bool wide_indices, int64_t nnz,
                 const void* base, const void* values, DType dtype, int threads);

}  // namespace speft
