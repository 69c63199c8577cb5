// sampled_grad: dv[e] = sum over m of dy[m, row_e] * x[m, col_e].
//
// For each block of tokens the team packs the used columns of dy and x into panels, then each
// thread sums its share of the entries. Entries are shared out evenly, whatever rows they are in.
// Every entry is summed over the blocks in order, so the result does not depend on the threads.
//
// Count (M tokens, R used rows, C used columns, E entries, float32): reads 4 M (R + C) bytes of
// operands, at worst whole 64-byte lines of them; writes and reads as much in L2; 2 M E operations
// on 8 M E bytes from L1 and L2.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"

namespace speft {
namespace {

// out[e] += row . panel[local[e]] for `count` entries of one row; four at a time, so that a loaded
// vector of the row serves four products.
template <class Acc>
SPEFT_INLINE void dots(const Acc* row, const Acc* panel, int width, const int32_t* local,
                       int64_t count, Acc* out) {
    constexpr int lanes = VectorOf<Acc>::lanes;
    int64_t e = 0;
    for (; e + 4 <= count; e += 4) {
        const Acc* p0 = panel + int64_t(local[e]) * width;
        const Acc* p1 = panel + int64_t(local[e + 1]) * width;
        const Acc* p2 = panel + int64_t(local[e + 2]) * width;
        const Acc* p3 = panel + int64_t(local[e + 3]) * width;
        Vector<Acc> s0 = {}, s1 = {}, s2 = {}, s3 = {};
        for (int t = 0; t < width; t += lanes) {
            const Vector<Acc> r = load_aligned(row + t);
            s0 += r * load_aligned(p0 + t);
            s1 += r * load_aligned(p1 + t);
            s2 += r * load_aligned(p2 + t);
            s3 += r * load_aligned(p3 + t);
        }
        out[e] += sum_lanes<Acc>(s0);
        out[e + 1] += sum_lanes<Acc>(s1);
        out[e + 2] += sum_lanes<Acc>(s2);
        out[e + 3] += sum_lanes<Acc>(s3);
    }
    for (; e < count; ++e) {
        const Acc* p = panel + int64_t(local[e]) * width;
        Vector<Acc> s = {};
        for (int t = 0; t < width; t += lanes)
            s += load_aligned(row + t) * load_aligned(p + t);
        out[e] += sum_lanes<Acc>(s);
    }
}

// The entries [entries.begin, entries.end), which lie in rows from `row` on.
template <class Acc>
SPEFT_INLINE void all_dots(const Acc* dy_panel, const Acc* x_panel, int width,
                           const CompactIndices& pattern, int64_t row, Range entries, Acc* out) {
    for (int64_t e = entries.begin; e < entries.end; ++row) {
        const int64_t stop = std::min(pattern.crow[row + 1], entries.end);
        dots(dy_panel + row * width, x_panel, width, pattern.local + e, stop - e, out + e);
        e = stop;
    }
}

SPEFT_MULTIVERSION void sum_block(const float* dy_panel, const float* x_panel, int width,
                                  const CompactIndices& pattern, int64_t row, Range entries,
                                  float* out) {
    all_dots(dy_panel, x_panel, width, pattern, row, entries, out);
}
SPEFT_MULTIVERSION void sum_block(const double* dy_panel, const double* x_panel, int width,
                                  const CompactIndices& pattern, int64_t row, Range entries,
                                  double* out) {
    all_dots(dy_panel, x_panel, width, pattern, row, entries, out);
}

template <class T>
void run(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, int64_t tokens,
         const CompactIndices& pattern, Accumulator<T>* out, bool accumulate, int threads) {
    using Acc = Accumulator<T>;
    const int64_t nnz = pattern.nnz();
    if (!accumulate) std::fill(out, out + nnz, Acc(0));
    if (nnz == 0 || tokens == 0) return;
    const int width = block_tokens<Acc>(pattern.num_rows + pattern.num_cols, tokens);
    auto dy_panel = scratch<Acc>(pattern.num_rows * width);
    auto x_panel = scratch<Acc>(pattern.num_cols * width);
    parallel(threads, [&](Worker worker) {
        const Range rows = worker.share(pattern.num_rows), cols = worker.share(pattern.num_cols);
        const Range entries = worker.share(nnz);
        const int64_t* crow = pattern.crow;
        const int64_t first =
            std::upper_bound(crow, crow + pattern.num_rows + 1, entries.begin) - crow - 1;
        for (int64_t m = 0; m < tokens; m += width) {
            const int valid = int(std::min<int64_t>(width, tokens - m));
            pack_panel(dy + m * dy_stride, dy_stride, valid, pattern.rows, rows, width,
                       dy_panel.get());
            pack_panel(x + m * x_stride, x_stride, valid, pattern.cols, cols, width, x_panel.get());
            worker.barrier();
            sum_block(dy_panel.get(), x_panel.get(), width, pattern, first, entries, out);
            worker.barrier();
        }
    });
}

}  // namespace

void sampled_grad(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                  int64_t tokens, const CompactIndices& pattern, void* out, bool accumulate,
                  DType dtype, int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, tokens,
            pattern, static_cast<Accumulator<T>*>(out), accumulate, threads);
    });
}

}  // namespace speft
