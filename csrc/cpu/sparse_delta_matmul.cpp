// sparse_delta_matmul: y[m, row_e] += values[e] * x[m, col_e], the sparse part of x @ (W + D)^T.
//
// As sampled_grad, over blocks of tokens: the team packs the used columns of x, each thread sums
// the rows of D that are its share into a panel of y, and the team adds that panel to y. Rows are
// shared out by their entries. A row is summed in order, so threads do not change the result.
//
// Count (M tokens, R used rows, C used columns, E entries, float32): reads 4 M (R + C) bytes of x
// and y and writes 4 M R, at worst whole lines; 2 M E operations on 4 M E bytes from L1 and L2.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"

namespace speft {
namespace {

constexpr int kVectorsAtOnce = 4;  // of one row's sum, held in registers while its entries pass

template <class Acc>
SPEFT_INLINE void sum_row(const Acc* panel, int width, const int32_t* local, const Acc* values,
                          int64_t count, Acc* sums) {
    constexpr int lanes = VectorOf<Acc>::lanes;
    int t = 0;
    for (; t + kVectorsAtOnce * lanes <= width; t += kVectorsAtOnce * lanes) {
        Vector<Acc> s[kVectorsAtOnce] = {};
        for (int64_t e = 0; e < count; ++e) {
            const Acc* p = panel + int64_t(local[e]) * width + t;
            for (int i = 0; i < kVectorsAtOnce; ++i)
                s[i] += values[e] * load_aligned(p + i * lanes);
        }
        __builtin_memcpy(sums + t, s, sizeof(s));
    }
    for (; t < width; t += lanes) {
        Vector<Acc> s = {};
        for (int64_t e = 0; e < count; ++e)
            s += values[e] * load_aligned(panel + int64_t(local[e]) * width + t);
        __builtin_memcpy(sums + t, &s, sizeof(s));
    }
}

SPEFT_MULTIVERSION void sum_rows(const float* panel, int width, const CompactIndices& delta,
                                 const float* values, Range rows, float* sums) {
    for (int64_t r = rows.begin; r < rows.end; ++r)
        sum_row(panel, width, delta.local + delta.crow[r], values + delta.crow[r],
                delta.crow[r + 1] - delta.crow[r], sums + r * width);
}
SPEFT_MULTIVERSION void sum_rows(const double* panel, int width, const CompactIndices& delta,
                                 const double* values, Range rows, double* sums) {
    for (int64_t r = rows.begin; r < rows.end; ++r)
        sum_row(panel, width, delta.local + delta.crow[r], values + delta.crow[r],
                delta.crow[r + 1] - delta.crow[r], sums + r * width);
}

// y[t, rows[r]] += sums[r, t]
template <class T>
void add_rows(T* y, int64_t y_stride, Range tokens, const CompactIndices& delta, int width,
              const Accumulator<T>* sums) {
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
        for (int64_t r = 0; r < delta.num_rows; ++r) {
            T* to = y + t * y_stride + delta.rows[r];
            narrow(widen(*to) + sums[r * width + t], to);
        }
}

// Few tokens (decoding): a panel would be mostly padding, and each entry is read once anyway.
constexpr int64_t kFewTokens = 4;

template <class T>
void add_directly(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t tokens,
                  const CompactIndices& delta, const Accumulator<T>* values, Range rows) {
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t r = rows.begin; r < rows.end; ++r) {
            Accumulator<T> sum = 0;
            for (int64_t e = delta.crow[r]; e < delta.crow[r + 1]; ++e)
                sum += values[e] * widen(x[m * x_stride + delta.cols[delta.local[e]]]);
            T* to = y + m * y_stride + delta.rows[r];
            narrow(widen(*to) + sum, to);
        }
}

// The rows whose entries begin in the worker's share of all entries.
Range rows_by_entries(const Worker& worker, const CompactIndices& delta) {
    const Range entries = worker.share(delta.nnz());
    const int64_t *begin = delta.crow, *end = delta.crow + delta.num_rows;
    return {std::lower_bound(begin, end, entries.begin) - begin,
            std::lower_bound(begin, end, entries.end) - begin};
}

template <class T>
void run(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t tokens,
         const CompactIndices& delta, const Accumulator<T>* values, int threads) {
    using Acc = Accumulator<T>;
    if (delta.nnz() == 0 || tokens == 0) return;
    if (tokens <= kFewTokens) {
        parallel(threads, [&](Worker worker) {
            add_directly(y, y_stride, x, x_stride, tokens, delta, values,
                         rows_by_entries(worker, delta));
        });
        return;
    }
    const int width = block_tokens<Acc>(delta.num_rows + delta.num_cols, tokens);
    auto x_panel = scratch<Acc>(delta.num_cols * width);
    auto sums = scratch<Acc>(delta.num_rows * width);
    parallel(threads, [&](Worker worker) {
        const Range cols = worker.share(delta.num_cols), rows = rows_by_entries(worker, delta);
        for (int64_t m = 0; m < tokens; m += width) {
            const int valid = int(std::min<int64_t>(width, tokens - m));
            pack_panel(x + m * x_stride, x_stride, valid, delta.cols, cols, width, x_panel.get());
            worker.barrier();
            sum_rows(x_panel.get(), width, delta, values, rows, sums.get());
            worker.barrier();
            add_rows(y + m * y_stride, y_stride, worker.share(valid), delta, width, sums.get());
        }
    });
}

}  // namespace

void sparse_delta_matmul(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t tokens,
                         const CompactIndices& delta, const void* values, DType dtype,
                         int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run(static_cast<T*>(y), y_stride, static_cast<const T*>(x), x_stride, tokens, delta,
            static_cast<const Accumulator<T>*>(values), threads);
    });
}

}  // namespace speft
