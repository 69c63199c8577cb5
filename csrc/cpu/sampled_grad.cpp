// sampled_grad: dv[e] = sum over m of dy[m, row_e] * x[m, col_e].
//
// The used columns of dy and x of one block of tokens are packed into panels; then every entry is a
// dot product of two rows of the panels. Where a team shares a block, entries are shared out
// evenly, whatever rows they are in.
//
// Count (M tokens, R used rows, C used columns, E entries, float32): reads 4 M (R + C) bytes of
// operands, at worst whole 64-byte lines of them; writes and reads as much in L2; 2 M E operations
// on 8 M E bytes from L1 and L2.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"
#include "token_sum.h"

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
        add_sums_of_lanes<Acc>(s0, s1, s2, s3, out + e);
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
    struct Panels {
        Scratch<Acc> dy, x;
    };
    const int64_t nnz = pattern.nnz();
    const int width = block_tokens<Acc>(pattern.num_rows + pattern.num_cols, tokens);
    const auto make_panels = [&] {
        return Panels{scratch<Acc>(pattern.num_rows * width),
                      scratch<Acc>(pattern.num_cols * width)};
    };
    const auto add_block = [&](Worker worker, Panels& panels, int64_t m, int64_t count, Acc* sums) {
        const Range rows = worker.share(pattern.num_rows), cols = worker.share(pattern.num_cols);
        pack_panel(dy + m * dy_stride, dy_stride, int(count), pattern.rows, rows, width,
                   panels.dy.get());
        pack_panel(x + m * x_stride, x_stride, int(count), pattern.cols, cols, width,
                   panels.x.get());
        worker.barrier();
        const Range entries = worker.share(nnz);
        const int64_t *begin = pattern.crow, *end = begin + pattern.num_rows + 1;
        const int64_t first = std::upper_bound(begin, end, entries.begin) - begin - 1;
        sum_block(panels.dy.get(), panels.x.get(), width, pattern, first, entries, sums);
        worker.barrier();
    };
    sum_over_tokens(tokens, width, nnz, out, accumulate, threads, make_panels, add_block);
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
