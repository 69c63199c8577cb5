// block_grad: dV[b] = dy[:, rows_b]^T @ x[:, cols_b].
//
// The used groups of columns of dy and x of one stretch of tokens are copied, widened, into two
// slabs, which are then multiplied tile by tile. A tile is 8 x 16 products (8 x 8 in float64), half
// of it at a time in registers over the stretch, or all: the longer side of a block lies along the
// vector.
//
// Count (M tokens, R and C used rows and columns, E entries, float32): reads 4 M (R + C) bytes once
// from memory; 2 M E operations, one vector load and 8 broadcasts for 8 vector multiply-adds
// (AVX-512; two loads and 4 for 8 with AVX2).
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"
#include "token_sum.h"

namespace speft {
namespace {

constexpr int kTileHeight = 8;

// To copy an element costs as much as this many products of a tile. A thread needs some 80 us of
// work: with few splits the team meets twice a block of tokens, and reads what the others copied.
constexpr int64_t kWorkOfCopy = 16, kWorkPerThread = 1 << 22;

// One operand's used groups of `size` neighbouring columns, and where each block's group lies in
// the slab.
struct Groups {
    std::vector<int32_t> used;
    std::vector<int32_t> place;  // [num_blocks]
    int64_t size;

    Groups(const int32_t* of_block, int64_t num_blocks, int64_t group_size)
        : used(of_block, of_block + num_blocks), place(num_blocks), size(group_size) {
        std::sort(used.begin(), used.end());
        used.erase(std::unique(used.begin(), used.end()), used.end());
        for (int64_t b = 0; b < num_blocks; ++b)
            place[b] =
                int32_t(std::lower_bound(used.begin(), used.end(), of_block[b]) - used.begin());
    }
    int64_t columns() const { return int64_t(used.size()) * size; }
};

// slab[t, i * size + j] = matrix[t, used[i] * size + j]
template <class T>
SPEFT_INLINE void copy(const T* matrix, int64_t stride, Range tokens, const int32_t* used,
                       int64_t count, int64_t size, int64_t slab_stride, Accumulator<T>* slab) {
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
        for (int64_t i = 0; i < count; ++i) {
            const T* from = matrix + t * stride + used[i] * size;
            Accumulator<T>* to = slab + t * slab_stride + i * size;
            for (int64_t j = 0; j < size; ++j)
                to[j] = widen(from[j]);
        }
}

// out[i * row_step + j * lane_step] += sum over t of tall[t, i] * wide[t, j], i < height, j < width
template <int kBytes, int kHeight, class Acc>
SPEFT_INLINE void add_lines(const Acc* tall, int64_t tall_stride, const Acc* wide,
                            int64_t wide_stride, int tokens, int width, int64_t row_step,
                            int64_t lane_step, Acc* out) {
    using L = Lanes<Acc, kBytes>;
    L sums[kHeight];
    for (int t = 0; t < tokens; ++t) {
        const L v = L::from(wide + t * wide_stride);
        for (int i = 0; i < kHeight; ++i)
            sums[i].add_product(tall[t * tall_stride + i], v);
    }
    for (int i = 0; i < kHeight; ++i) {
        Acc sum[L::count];
        sums[i].to(sum);
        for (int j = 0; j < width; ++j)
            out[i * row_step + j * lane_step] += sum[j];
    }
}

// As many lines at a time as the registers hold: 8 need 8 of AVX-512's 32, 4 need 8 of AVX2's 16.
template <int kBytes, class Acc>
SPEFT_INLINE void add_tile(int height, const Acc* tall, int64_t tall_stride, const Acc* wide,
                           int64_t wide_stride, int tokens, int width, int64_t row_step,
                           int64_t lane_step, Acc* out) {
    int i = 0;
    const auto add = [&](auto lines) SPEFT_INLINED {
        for (; i + lines <= height; i += lines)
            add_lines<kBytes, lines>(tall + i, tall_stride, wide, wide_stride, tokens, width,
                                     row_step, lane_step, out + i * row_step);
    };
    if constexpr (kBytes == kAvx512) add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 1>{});
}

template <class T>
struct Operand {
    const T* matrix;
    int64_t stride;
    Groups groups;
};

template <class T>
void fill_slab(const Operand<T>& operand, int64_t first, Range tokens, int64_t columns,
               Accumulator<T>* slab) {
    const Groups& groups = operand.groups;
    vectorised([&](auto) SPEFT_INLINED {
        copy(operand.matrix + first * operand.stride, operand.stride, tokens, groups.used.data(),
             int64_t(groups.used.size()), groups.size, columns, slab);
    });
}

template <class T>
void run(const Operand<T>& dy, const Operand<T>& x, int64_t out_features, int64_t tokens,
         int64_t num_blocks, Accumulator<T>* out, bool accumulate, int threads) {
    using Acc = Accumulator<T>;
    constexpr int lanes = kVectorBytes / sizeof(Acc);
    const int64_t block_height = dy.groups.size, block_width = x.groups.size;
    const bool turned = block_height > block_width;
    const Operand<T>&tall = turned ? x : dy, &wide = turned ? dy : x;
    const int64_t block_entries = block_height * block_width;
    const int64_t row_step = turned ? 1 : block_width, lane_step = turned ? block_width : 1;
    const int64_t tall_columns = tall.groups.columns();
    // A tile may read up to a vector beyond the last group: those lanes, which are zero, are never
    // stored.
    const int64_t wide_columns = wide.groups.columns() + lanes;
    const int stretch = block_tokens<Acc>(tall_columns + wide_columns, tokens);
    struct Slabs {
        Scratch<Acc> tall, wide;
    };
    const auto make_slabs = [&] {
        Slabs slabs{scratch<Acc>(tall_columns * stretch), scratch<Acc>(wide_columns * stretch)};
        for (int64_t t = 1; t <= stretch; ++t)
            std::fill_n(slabs.wide.get() + t * wide_columns - lanes, lanes, Acc(0));
        return slabs;
    };
    const int64_t down = (tall.groups.size + kTileHeight - 1) / kTileHeight;
    const int64_t across = (wide.groups.size + lanes - 1) / lanes;
    const auto add_block = [&](Worker worker, Slabs& slabs, int64_t m, int64_t count, Acc* sums) {
        fill_slab(tall, m, worker.share(count), tall_columns, slabs.tall.get());
        fill_slab(wide, m, worker.share(count), wide_columns, slabs.wide.get());
        worker.barrier();
        const Range tiles = worker.share(num_blocks * down * across);
        for (int64_t i = tiles.begin; i < tiles.end; ++i) {
            const int64_t b = i / (down * across);
            const int64_t row = i / across % down * kTileHeight, lane = i % across * lanes;
            const int height = int(std::min<int64_t>(kTileHeight, tall.groups.size - row));
            const int width = int(std::min<int64_t>(lanes, wide.groups.size - lane));
            const Acc* a = slabs.tall.get() + tall.groups.place[b] * tall.groups.size + row;
            const Acc* v = slabs.wide.get() + wide.groups.place[b] * wide.groups.size + lane;
            Acc* to = sums + b * block_entries + row * row_step + lane * lane_step;
            vectorised([&](auto bytes) SPEFT_INLINED {
                add_tile<bytes>(height, a, tall_columns, v, wide_columns, int(count), width,
                                row_step, lane_step, to);
            });
        }
        worker.barrier();
    };
    const int64_t products = num_blocks * tall.groups.size * across * lanes;
    const int64_t work = products + kWorkOfCopy * (tall_columns + wide_columns);
    threads = threads_for(tokens * work, kWorkPerThread, threads);
    sum_over_tokens(tokens, stretch, num_blocks * block_entries, out_features * x.groups.columns(),
                    out, accumulate, threads, make_slabs, add_block);
}

}  // namespace

void block_grad(const void* dy, int64_t dy_stride, int64_t out_features, const void* x,
                int64_t x_stride, int64_t tokens, const int32_t* block_rows,
                const int32_t* block_cols, int64_t num_blocks, int64_t block_height,
                int64_t block_width, void* out, bool accumulate, DType dtype, int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run(Operand<T>{static_cast<const T*>(dy), dy_stride,
                       Groups(block_rows, num_blocks, block_height)},
            Operand<T>{static_cast<const T*>(x), x_stride,
                       Groups(block_cols, num_blocks, block_width)},
            out_features, tokens, num_blocks, static_cast<Accumulator<T>*>(out), accumulate,
            threads);
    });
}

}  // namespace speft
