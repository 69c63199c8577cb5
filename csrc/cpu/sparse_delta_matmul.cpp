// sparse_delta_matmul: y[m, row_e] += values[e] * x[m, col_e], the sparse part of x @ (W + D)^T.
//
// Threads share the tokens, a block at a time: the used columns of x are packed into a panel, each
// row of D sums its entries into a panel of y, and that panel is added to y. A token's sum runs
// over its row's entries in order, so neither blocks nor threads change the result. A few tokens
// share the rows of D instead.
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

template <int kBytes, int kVectors, class Acc>
SPEFT_INLINE void sum_lines(const Acc* panel, int width, const int32_t* local, const Acc* values,
                            int64_t count, Acc* sums) {
    using L = Lanes<Acc, kBytes>;
    L s[kVectors];
    for (int64_t e = 0; e < count; ++e) {
        const Acc* line = panel + int64_t(local[e]) * width;
        for (int i = 0; i < kVectors; ++i)
            s[i].add_product(values[e], L::from(line + i * L::count));
    }
    for (int i = 0; i < kVectors; ++i)
        s[i].to(sums + i * L::count);
}

// sums[r, t] = the sum over row r's entries of values[e] * panel[local[e], t]
template <int kBytes, class Acc>
SPEFT_INLINE void sum_rows(const Acc* panel, int width, const CompactIndices& delta,
                           const Acc* values, Acc* sums) {
    constexpr int step = Lanes<Acc, kBytes>::count, many = kVectorsAtOnce * step;
    for (int64_t r = 0; r < delta.num_rows; ++r) {
        const int64_t first = delta.crow[r], count = delta.crow[r + 1] - first;
        const int32_t* local = delta.local + first;
        int t = 0;
        for (; t + many <= width; t += many)
            sum_lines<kBytes, kVectorsAtOnce>(panel + t, width, local, values + first, count,
                                              sums + r * width + t);
        for (; t < width; t += step)
            sum_lines<kBytes, 1>(panel + t, width, local, values + first, count,
                                 sums + r * width + t);
    }
}

// Up to this many rows of a group are added one element at a time; more are turned in a square.
constexpr int64_t kFewRows = 2;

// y[t, rows[r] - first] += sums[r, t] for `count` rows that lie within [first, first + lanes), all
// of them columns of y. The others there keep their bits.
template <int kBytes, class T>
SPEFT_INLINE void add_square(T* y, int64_t y_stride, int tokens, const int32_t* rows, int64_t count,
                             int64_t first, int width, const Accumulator<T>* sums) {
    using Acc = Accumulator<T>;
    constexpr int lanes = VectorOf<Acc, kBytes>::lanes;
    using Bits = typename std::conditional<sizeof(T) == 2, uint16_t, uint32_t>::type;
    alignas(kVectorBytes) static const Acc zeros[lanes] = {};
    const Acc* from[lanes];
    for (int j = 0; j < lanes; ++j)
        from[j] = zeros;
    Bits used[lanes] = {};
    for (int64_t r = 0; r < count; ++r) {
        from[rows[r] - first] = sums + r * width;
        used[rows[r] - first] = Bits(-1);
    }
    Vector<Acc, kBytes> square[lanes];
    for (int j = 0; j < lanes; ++j)
        square[j] = load<Acc, kBytes>(from[j]);
    transpose<Acc, kBytes>(square);
    for (int t = 0; t < tokens; ++t) {
        T line[lanes];
        Acc sum[lanes];
        __builtin_memcpy(line, y + t * y_stride, sizeof(line));
        __builtin_memcpy(sum, &square[t], kBytes);
        for (int j = 0; j < lanes; ++j) {
            T added;
            narrow(widen(line[j]) + sum[j], &added);
            line[j] = bit_cast<T>(Bits((bit_cast<Bits>(added) & used[j]) |
                                       (bit_cast<Bits>(line[j]) & Bits(~used[j]))));
        }
        __builtin_memcpy(y + t * y_stride, line, sizeof(line));
    }
}

// y[t, rows[r]] += sums[r, t]: as many tokens at a time as a square has, so that the lines of y
// and of the sums are read from end to end.
template <int kBytes, class T>
SPEFT_INLINE void add_rows(T* y, int64_t y_stride, int tokens, const CompactIndices& delta,
                           int width, const Accumulator<T>* sums) {
    constexpr int lanes = VectorOf<Accumulator<T>, kBytes>::lanes;
    const int64_t end = delta.rows[delta.num_rows - 1] + 1;
    for (int t0 = 0; t0 < tokens; t0 += lanes) {
        const int some = std::min(lanes, tokens - t0);
        T* lines = y + t0 * y_stride;
        for (int64_t r = 0; r < delta.num_rows;) {
            const int64_t group = delta.rows[r] / lanes * lanes;
            int64_t next = r + 1;
            while (next < delta.num_rows && delta.rows[next] < group + lanes)
                ++next;
            if constexpr (!std::is_same<T, double>::value) {  // which is not turned in registers
                if (next - r > kFewRows && group + lanes <= end) {
                    add_square<kBytes>(lines + group, y_stride, some, delta.rows + r, next - r,
                                       group, width, sums + r * width + t0);
                    r = next;
                }
            }
            for (; r < next; ++r)
                for (int t = 0; t < some; ++t) {
                    T* to = lines + t * y_stride + delta.rows[r];
                    narrow(widen(*to) + sums[r * width + t0 + t], to);
                }
        }
    }
}

// Few tokens (decoding): a panel would be mostly padding, and each entry is read once anyway.
constexpr int64_t kFewTokens = 4;
constexpr int64_t kWorkOfEntry = 8;  // here, in the unit of kWorkOfPacking (panel.h)

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
void run(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t in_features, int64_t tokens,
         const CompactIndices& delta, const Accumulator<T>* values, int threads) {
    using Acc = Accumulator<T>;
    if (delta.nnz() == 0 || tokens == 0) return;
    if (tokens <= kFewTokens) {
        threads = threads_for(kWorkOfEntry * tokens * delta.nnz(), kPanelWorkPerThread, threads);
        parallel(threads, [&](Worker worker) {
            add_directly(y, y_stride, x, x_stride, tokens, delta, values,
                         rows_by_entries(worker, delta));
        });
        return;
    }
    const int64_t work = delta.nnz() + kWorkOfPacking * (delta.num_rows + delta.num_cols);
    threads = threads_for(tokens * work, kPanelWorkPerThread, threads);
    // Every thread has a block of tokens, if there are that many.
    const int64_t each = (tokens + threads - 1) / threads;
    const int width = block_tokens<Acc>(delta.num_rows + delta.num_cols, each);
    const int64_t blocks = (tokens + width - 1) / width;
    threads = int(std::min<int64_t>(threads, blocks));
    auto panels = scratch<Acc>(threads * delta.num_cols * width);
    auto sums = scratch<Acc>(threads * delta.num_rows * width);
    parallel(threads, [&](Worker worker) {
        Acc* own_panel = panels.get() + worker.index * delta.num_cols * width;
        Acc* own_sums = sums.get() + worker.index * delta.num_rows * width;
        const Range mine = worker.share(blocks);
        for (int64_t m = mine.begin * width; m < std::min(tokens, mine.end * width); m += width) {
            const int count = int(std::min<int64_t>(width, tokens - m));
            pack_panel(Tokens<T>{x + m * x_stride, x_stride, in_features, count}, delta.cols,
                       delta.num_cols, width, own_panel);
            vectorised([&](auto bytes) SPEFT_INLINED {
                sum_rows<bytes>(own_panel, width, delta, values, own_sums);
            });
            vectorised([&](auto bytes) SPEFT_INLINED {
                add_rows<bytes>(y + m * y_stride, y_stride, count, delta, width, own_sums);
            });
        }
    });
}

}  // namespace

void sparse_delta_matmul(void* y, int64_t y_stride, const void* x, int64_t x_stride,
                         int64_t in_features, int64_t tokens, const CompactIndices& delta,
                         const void* values, DType dtype, int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run(static_cast<T*>(y), y_stride, static_cast<const T*>(x), x_stride, in_features, tokens,
            delta, static_cast<const Accumulator<T>*>(values), threads);
    });
}

}  // namespace speft
