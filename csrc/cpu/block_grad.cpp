// block_grad: dV[b] = dy[:, rows_b]^T @ x[:, cols_b].
//
// The used groups of columns of dy and x of one stretch of tokens are copied, widened, into two
// slabs, which are then multiplied tile by tile. A tile is 8 x 16 products (8 x 8 in float64), half
// of it at a time in registers over the stretch, or all: the longer side of a block lies along the
// vector.
//
// A small block would leave most of that vector empty. The columns of such blocks are packed into
// panels instead, transposed, and tokens lie along the vector.
//
// Count (M tokens, R and C used rows and columns, E entries, float32): reads 4 M (R + C) bytes once
// from memory; 2 M E operations. Of a slab one vector load and 8 broadcasts for 8 vector
// multiply-adds (AVX-512; two loads and 4 for 8 with AVX2), where the longer side fills the vector;
// of panels a load for each row and column of a block and 16 tokens, and a sum of lanes for each
// entry and stretch.
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

// One operand's used groups of `size` neighbouring columns, and where each block's group lies among
// them.
struct Groups {
    std::vector<int32_t> used;
    std::vector<int32_t> place;  // [num_blocks]
    int64_t size;

    Groups(const int32_t* of_block, int64_t num_blocks, int64_t group_size, int64_t width)
        : place(num_blocks), size(group_size) {
        constexpr int32_t unused = -1;
        std::vector<int32_t> place_of(width / size, unused);
        for (int64_t b = 0; b < num_blocks; ++b)
            place_of[of_block[b]] = 0;
        for (size_t group = 0; group < place_of.size(); ++group) {
            if (place_of[group] == unused) continue;
            place_of[group] = int32_t(used.size());
            used.push_back(int32_t(group));
        }
        for (int64_t b = 0; b < num_blocks; ++b)
            place[b] = place_of[of_block[b]];
    }
    int64_t columns() const { return int64_t(used.size()) * size; }
    std::vector<int32_t> list_columns() const {
        std::vector<int32_t> all;
        all.reserve(columns());
        for (const int32_t group : used)
            for (int64_t j = 0; j < size; ++j)
                all.push_back(int32_t(group * size + j));
        return all;
    }
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
    int64_t stride, columns;
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

// out[i * row_step + j] += dy[i] . x[j], i < kHeight, j < kWidth: lines of `tokens` tokens.
template <int kBytes, int kHeight, int kWidth, class Acc>
SPEFT_INLINE void add_products(const Acc* dy, const Acc* x, int tokens, int64_t row_step,
                               Acc* out) {
    using L = Lanes<Acc, kBytes>;
    constexpr int count = kHeight * kWidth;
    L sums[(count + 3) / 4 * 4];
    for (int t = 0; t < tokens; t += L::count) {
        L v[kWidth];
        for (int j = 0; j < kWidth; ++j)
            v[j] = L::from(x + j * tokens + t);
        for (int i = 0; i < kHeight; ++i) {
            const L a = L::from(dy + i * tokens + t);
            for (int j = 0; j < kWidth; ++j)
                sums[i * kWidth + j].add_product(a, v[j]);
        }
    }
    for (int n = 0; n < count; n += 4) {
        if constexpr (kWidth == 4) {
            add_sums_of_lanes(sums + n, out + n / kWidth * row_step);
            continue;
        }
        Acc sum[4] = {};
        add_sums_of_lanes(sums + n, sum);
        for (int q = 0; q < 4 && n + q < count; ++q)
            out[(n + q) / kWidth * row_step + (n + q) % kWidth] += sum[q];
    }
}

// As many sums at a time as the registers hold, as in sampled_grad's tiles: 4 x 4 with AVX-512.
template <int kBytes, class Acc>
SPEFT_INLINE void add_small_block(int height, int width, const Acc* dy, const Acc* x, int tokens,
                                  Acc* out) {
    const auto by_side = [](int size, auto&& f) SPEFT_INLINED {
        int i = 0;
        const auto all_of = [&](auto side) SPEFT_INLINED {
            for (; i + side <= size; i += side)
                f(i, side);
        };
        if constexpr (kBytes == kAvx512) all_of(std::integral_constant<int, 4>{});
        all_of(std::integral_constant<int, 2>{});
        all_of(std::integral_constant<int, 1>{});
    };
    by_side(height, [&](int i, auto tall) SPEFT_INLINED {
        by_side(width, [&](int j, auto wide) SPEFT_INLINED {
            add_products<kBytes, tall, wide>(dy + i * tokens, x + j * tokens, tokens, width,
                                             out + i * width + j);
        });
    });
}

template <class T>
void sum_in_panels(const Operand<T>& dy, const Operand<T>& x, int64_t tokens, int64_t num_blocks,
                   Accumulator<T>* out, bool accumulate, int threads) {
    using Acc = Accumulator<T>;
    const int height = int(dy.groups.size), width = int(x.groups.size);
    const std::vector<int32_t> dy_columns = dy.groups.list_columns();
    const std::vector<int32_t> x_columns = x.groups.list_columns();
    const int64_t columns = int64_t(dy_columns.size() + x_columns.size());
    const int stretch = block_tokens<Acc>(columns, tokens);
    struct Panels {
        Scratch<Acc> dy, x;
    };
    const auto make_panels = [&] {
        return Panels{scratch<Acc>(int64_t(dy_columns.size()) * stretch),
                      scratch<Acc>(int64_t(x_columns.size()) * stretch)};
    };
    const auto add_block = [&](Worker worker, Panels& panels, int64_t first, int64_t count,
                               Acc* sums) {
        const auto pack = [&](const Operand<T>& operand, const std::vector<int32_t>& which,
                              Acc* panel) {
            const Tokens<T> some{operand.matrix + first * operand.stride, operand.stride,
                                 operand.columns, int(count)};
            const Range mine = worker.share(int64_t(which.size()));
            pack_panel(some, which.data() + mine.begin, mine.end - mine.begin, stretch,
                       panel + mine.begin * stretch);
        };
        pack(dy, dy_columns, panels.dy.get());
        pack(x, x_columns, panels.x.get());
        worker.barrier();
        const Range mine = worker.share(num_blocks);
        vectorised([&](auto bytes) SPEFT_INLINED {
            for (int64_t b = mine.begin; b < mine.end; ++b)
                add_small_block<bytes>(height, width,
                                       panels.dy.get() + dy.groups.place[b] * height * stretch,
                                       panels.x.get() + x.groups.place[b] * width * stretch,
                                       stretch, sums + b * height * width);
        });
        worker.barrier();
    };
    const int64_t entries = num_blocks * height * width;
    threads =
        threads_for(tokens * (entries + kWorkOfPacking * columns), kPanelWorkPerThread, threads);
    sum_over_tokens(tokens, stretch, entries, dy.columns * int64_t(x_columns.size()), out,
                    accumulate, threads, make_panels, add_block);
}

template <class T>
void sum_in_slabs(const Operand<T>& dy, const Operand<T>& x, int64_t tokens, int64_t num_blocks,
                  Accumulator<T>* out, bool accumulate, int threads) {
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
    sum_over_tokens(tokens, stretch, num_blocks * block_entries, dy.columns * x.groups.columns(),
                    out, accumulate, threads, make_slabs, add_block);
}

}  // namespace

void block_grad(const void* dy, int64_t dy_stride, int64_t out_features, const void* x,
                int64_t x_stride, int64_t in_features, int64_t tokens, const int32_t* block_rows,
                const int32_t* block_cols, int64_t num_blocks, int64_t block_height,
                int64_t block_width, void* out, bool accumulate, DType dtype, int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Operand<T> left{static_cast<const T*>(dy), dy_stride, out_features,
                              Groups(block_rows, num_blocks, block_height, out_features)};
        const Operand<T> right{static_cast<const T*>(x), x_stride, in_features,
                               Groups(block_cols, num_blocks, block_width, in_features)};
        // Small: it fits into a vector, but not along one.
        constexpr int64_t lanes = kVectorBytes / sizeof(Accumulator<T>);
        const bool small =
            block_height * block_width <= lanes && std::max(block_height, block_width) < lanes;
        const auto sum = small ? sum_in_panels<T> : sum_in_slabs<T>;
        sum(left, right, tokens, num_blocks, static_cast<Accumulator<T>*>(out), accumulate,
            threads);
    });
}

}  // namespace speft
