// sampled_grad: dv[e] = sum over m of dy[m, row_e] * x[m, col_e], for the entries of a plan that no
// panel serves (speft_kernels/parts.py): those in dense tiles, and the gathered rest.
//
// One block of tokens at a time, the used columns of x and of dy lie transposed in panels, so that
// every product runs along contiguous tokens. x may come packed so from the forward pass
// (keep_columns); dy is packed here, a chunk of rows at a time, and used while it is in the cache.
//
// Count (M tokens, R used rows, C used columns, E gathered entries, t tiles, float32): reads 4 M R
// bytes of dy, at worst whole 64-byte lines of them, and 4 M C of x; writes and reads as much in
// L2; 2 M E operations on 8 M E bytes from L1 and L2, and 512 M t on 64 M t.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"
#include "token_sum.h"

namespace speft {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // of dy packed at a time: a fifth of a 1.25 MB L2
constexpr int64_t kMostSplits = 16;
constexpr int64_t kTasks = 32;       // wanted: many enough to even out the threads
constexpr int64_t kRowsInPart = 64;  // at least

// In the unit of kWorkOfPacking (panel.h): to widen a packed element of 16 bits, and a tile.
constexpr int64_t kWorkOfWidening = 1, kWorkOfTile = 64;

constexpr int64_t kTileEntries = kTileSide * kTileSide;

// Where sums go: entry e to out[slots[e]], or to out[e] where there are no slots; product i of all
// tiles likewise, and nowhere where its slot is -1.
template <class Acc>
struct Sums {
    Acc *out, *tiles;
    const int32_t *slots, *tile_slots;
    SPEFT_INLINE Acc& operator[](int64_t e) const { return out[slots == nullptr ? e : slots[e]]; }
};

// Four entries at a time, whatever rows they are in: four sums hide the latency of one another.
template <int kBytes, class Acc>
SPEFT_INLINE void gather(const Acc* dy, const Acc* x, int width, const int32_t* rows,
                         const int32_t* cols, Range entries, const Sums<Acc>& sums) {
    using L = Lanes<Acc, kBytes>;
    int64_t e = entries.begin;
    for (; e + 4 <= entries.end; e += 4) {
        const Acc *a[4], *b[4];
        for (int i = 0; i < 4; ++i) {
            a[i] = dy + int64_t(rows[e + i]) * width;
            b[i] = x + int64_t(cols[e + i]) * width;
        }
        L s[4];
        for (int t = 0; t < width; t += L::count)
            for (int i = 0; i < 4; ++i)
                s[i].add_product(L::from(a[i] + t), L::from(b[i] + t));
        Acc sum[4] = {};
        add_sums_of_lanes(s, sum);
        for (int i = 0; i < 4; ++i)
            sums[e + i] += sum[i];
    }
    for (; e < entries.end; ++e) {
        const Acc* a = dy + int64_t(rows[e]) * width;
        const Acc* b = x + int64_t(cols[e]) * width;
        L s;
        for (int t = 0; t < width; t += L::count)
            s.add_product(L::from(a + t), L::from(b + t));
        sums[e] += Acc(0) + sum_lanes(s);  // a sum of -0 is 0, as among four
    }
}

// products[i, j] = dy[i] . x[j], kTileSide x kTileSide of them, as many at a time as the registers
// hold: 4 x 4 in 16 of the 32 that AVX-512 has, 2 x 2 in 8 of the 16 of AVX2.
template <int kBytes, class Acc>
SPEFT_INLINE void multiply(const Acc* const* dy, const Acc* const* x, int width, Acc* products) {
    using L = Lanes<Acc, kBytes>;
    constexpr int side = kBytes == kAvx512 ? 4 : 2;
    for (int i = 0; i < kTileSide; i += side)
        for (int j = 0; j < kTileSide; j += side) {
            L s[side * side];
            for (int t = 0; t < width; t += L::count) {
                L b[side];
                for (int q = 0; q < side; ++q)
                    b[q] = L::from(x[j + q] + t);
                for (int p = 0; p < side; ++p) {
                    const L a = L::from(dy[i + p] + t);
                    for (int q = 0; q < side; ++q)
                        s[p * side + q].add_product(a, b[q]);
                }
            }
            for (int n = 0; n < side * side; n += 4) {
                Acc sum[4] = {};
                add_sums_of_lanes(s + n, sum);
                for (int q = 0; q < 4; ++q)
                    products[(i + (n + q) / side) * kTileSide + j + (n + q) % side] = sum[q];
            }
        }
}

// to[i] += from[i]
template <class Acc>
void add_all(const Acc* from, int64_t count, Acc* to) {
    vectorised([&](auto) SPEFT_INLINED {
        for (int64_t i = 0; i < count; ++i)
            to[i] += from[i];
    });
}

// The first of sorted `lines` at or after `line`.
int64_t first_at(const int32_t* lines, int64_t count, int64_t line) {
    return std::lower_bound(lines, lines + count, line) - lines;
}

// What a token costs for the first `rows` used rows, apart from x.
int64_t work_of_rows(const SampledEntries& plan, int64_t rows) {
    const int64_t groups = (rows + kTileSide - 1) / kTileSide;
    return kWorkOfPacking * rows + first_at(plan.entry_rows, plan.num_entries, rows) +
           kWorkOfTile * first_at(plan.tile_rows, plan.num_tiles, groups);
}

// The used rows of part `part` of `parts`, alike in work; they begin at a multiple of kTileSide.
Range rows_of_part(const SampledEntries& plan, int64_t part, int64_t parts) {
    const auto begin_of = [&](int64_t p) {
        if (p == parts) return plan.num_rows;
        const int64_t wanted = work_of_rows(plan, plan.num_rows) * p / parts;
        int64_t low = 0, high = (plan.num_rows + kTileSide - 1) / kTileSide;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (work_of_rows(plan, middle * kTileSide) < wanted)
                low = middle + 1;
            else
                high = middle;
        }
        return std::min(low * kTileSide, plan.num_rows);
    };
    return {begin_of(part), begin_of(part + 1)};
}

template <class T>
struct Problem {
    using Acc = Accumulator<T>;
    Tokens<T> dy, x;  // x.data is null where x is packed
    const T* packed;  // [blocks, num_cols, width], or null
    int64_t tokens;
    int width;
    const SampledEntries& plan;

    int64_t blocks() const { return (tokens + width - 1) / width; }
    Tokens<T> block_of(const Tokens<T>& matrix, int64_t block) const {
        Tokens<T> some = matrix;
        some.data += block * width * matrix.stride;
        some.tokens = int(std::min<int64_t>(width, tokens - block * width));
        return some;
    }
    bool in_place() const { return packed != nullptr && std::is_same<T, Acc>::value; }
    // What it costs a token to bring x to a part, and to compute all entries.
    int64_t work_of_x() const {
        if (in_place()) return 0;
        return plan.num_cols * (packed == nullptr ? kWorkOfPacking : kWorkOfWidening);
    }
    int64_t work_of_entries() const { return work_of_rows(plan, plan.num_rows); }
};

template <class T>
struct Panels {
    using Acc = Accumulator<T>;
    Scratch<Acc> dy, x;
    int64_t rows;  // that fit into dy

    explicit Panels(const Problem<T>& problem) {
        const int64_t fit = kChunkBytes / int64_t(sizeof(Acc)) / problem.width;
        const int64_t all = (problem.plan.num_rows + kTileSide - 1) / kTileSide * kTileSide;
        rows = std::max<int64_t>(kTileSide, std::min(fit / kTileSide * kTileSide, all));
        dy = scratch<Acc>(rows * problem.width);
        if (!problem.in_place()) x = scratch<Acc>(problem.plan.num_cols * problem.width);
    }

    const Acc* x_of_block(const Problem<T>& problem, int64_t block) {
        const int64_t size = problem.plan.num_cols * problem.width;
        if constexpr (std::is_same<T, Acc>::value) {
            if (problem.packed != nullptr) return problem.packed + block * size;
        }
        if (problem.packed != nullptr) {
            const T* from = problem.packed + block * size;
            Acc* to = x.get();
            vectorised([&](auto) SPEFT_INLINED {
                for (int64_t i = 0; i < size; ++i)
                    to[i] = widen(from[i]);
            });
        } else {
            pack_panel(problem.block_of(problem.x, block), problem.plan.cols, problem.plan.num_cols,
                       problem.width, x.get());
        }
        return x.get();
    }
};

// Adds the products of one block of tokens for the entries of `rows`.
template <class T>
void add_block(const Problem<T>& problem, Panels<T>& panels, int64_t block, Range rows,
               const Sums<Accumulator<T>>& sums) {
    using Acc = Accumulator<T>;
    const SampledEntries& plan = problem.plan;
    const int width = problem.width;
    const Acc* x = panels.x_of_block(problem, block);
    const Tokens<T> dy = problem.block_of(problem.dy, block);
    for (int64_t first = rows.begin; first < rows.end; first += panels.rows) {
        const int64_t last = std::min(first + panels.rows, rows.end);
        pack_panel(dy, plan.rows + first, last - first, width, panels.dy.get());
        const Acc* chunk = panels.dy.get() - first * width;  // its line r is row r
        const int64_t tiles_end =
            first_at(plan.tile_rows, plan.num_tiles, (last + kTileSide - 1) / kTileSide);
        for (int64_t i = first_at(plan.tile_rows, plan.num_tiles, first / kTileSide); i < tiles_end;
             ++i) {
            const Acc *a[kTileSide], *b[kTileSide];
            for (int64_t j = 0; j < kTileSide; ++j) {
                a[j] = chunk + std::min(plan.tile_rows[i] * kTileSide + j, last - 1) * width;
                b[j] = x + std::min(plan.tile_cols[i] * kTileSide + j, plan.num_cols - 1) * width;
            }
            alignas(kVectorBytes) Acc products[kTileEntries];
            vectorised([&](auto bytes) SPEFT_INLINED { multiply<bytes>(a, b, width, products); });
            if (sums.tile_slots == nullptr) {
                add_all(products, kTileEntries, sums.tiles + i * kTileEntries);
                continue;
            }
            for (int64_t j = 0; j < kTileEntries; ++j) {
                const int32_t slot = sums.tile_slots[i * kTileEntries + j];
                if (slot >= 0) sums.tiles[slot] += products[j];
            }
        }
        const Range entries = {first_at(plan.entry_rows, plan.num_entries, first),
                               first_at(plan.entry_rows, plan.num_entries, last)};
        vectorised([&](auto bytes) SPEFT_INLINED {
            gather<bytes>(chunk, x, width, plan.entry_rows, plan.entry_cols, entries, sums);
        });
    }
}

// Into how many parts the used rows are cut. Many tasks even out the threads, but each part brings
// all of x once more, unless that is read in place: then there are as many as give each thread a
// task, as long as bringing x does not come to more than the rest of the work.
template <class T>
int64_t parts_of(const Problem<T>& problem, int64_t splits, int threads) {
    const auto for_tasks = [&](int64_t tasks) { return (tasks + splits - 1) / splits; };
    int64_t parts = std::min(for_tasks(kTasks), problem.plan.num_rows / kRowsInPart);
    if (!problem.in_place()) {
        const int64_t most = problem.work_of_entries() / problem.work_of_x();
        parts = std::min({parts, for_tasks(threads), most});
    }
    return std::max<int64_t>(1, parts);
}

// Tokens are cut into splits, in a number that depends on the problem alone, and used rows into
// parts. A task sums one part over one split, each entry by itself and in one order, whatever the
// parts are and whichever thread takes it: the result does not depend on threads. The splits are
// summed into buffers in the order of the plan, which are added in order after the threads have
// met, once. Where there is no room for two there is one split; a task then adds to `out` itself,
// and nothing is met for.
template <class T>
void run(const Problem<T>& problem, Accumulator<T>* out, bool accumulate, int threads) {
    using Acc = Accumulator<T>;
    const SampledEntries& plan = problem.plan;
    const int64_t sums_of_split = plan.num_entries + plan.num_tiles * kTileEntries;
    const int64_t splits = token_splits<Acc>(problem.blocks(), kMostSplits, sums_of_split,
                                             problem.dy.columns * plan.num_cols);
    threads = threads_for(
        problem.blocks() * problem.width * (problem.work_of_entries() + problem.work_of_x()),
        kPanelWorkPerThread, threads);
    const int64_t parts = parts_of(problem, splits, threads);
    const bool direct = splits == 1;
    std::vector<Range> rows;
    for (int64_t p = 0; p < parts; ++p)
        rows.push_back(rows_of_part(plan, p, parts));

    threads = int(std::min<int64_t>(threads, splits * parts));
    std::vector<Panels<T>> panels;
    for (int i = 0; i < threads; ++i)
        panels.emplace_back(problem);
    Scratch<Acc> buffers;
    if (!direct) buffers = scratch<Acc>(splits * sums_of_split);
    std::atomic<int64_t> next{0};

    // Calls f(place in the order of the plan, slot) for some of the entries and tiles.
    const auto each_slot = [&](Range entries, Range tiles, auto&& f) {
        for (int64_t e = entries.begin; e < entries.end; ++e)
            f(e, plan.slots == nullptr ? e : plan.slots[e]);
        for (int64_t i = tiles.begin * kTileEntries; i < tiles.end * kTileEntries; ++i)
            if (plan.tile_slots[i] >= 0) f(plan.num_entries + i, int64_t(plan.tile_slots[i]));
    };
    parallel(threads, [&](Worker worker) {
        for (int64_t task = next++; task < splits * parts; task = next++) {
            const int64_t split = task / parts;
            const Range mine = rows[task % parts];
            const Range entries = {first_at(plan.entry_rows, plan.num_entries, mine.begin),
                                   first_at(plan.entry_rows, plan.num_entries, mine.end)};
            const Range tiles = {
                // Rounded up as well: a part without rows, behind the last, has no tile of theirs.
                first_at(plan.tile_rows, plan.num_tiles, (mine.begin + kTileSide - 1) / kTileSide),
                first_at(plan.tile_rows, plan.num_tiles, (mine.end + kTileSide - 1) / kTileSide)};
            Sums<Acc> sums{out, out, plan.slots, plan.tile_slots};
            if (!direct) {
                Acc* own = buffers.get() + split * sums_of_split;
                sums = {own, own + plan.num_entries, nullptr, nullptr};
                std::fill(own + entries.begin, own + entries.end, Acc(0));
                std::fill(sums.tiles + tiles.begin * kTileEntries,
                          sums.tiles + tiles.end * kTileEntries, Acc(0));
            } else if (!accumulate) {
                each_slot(entries, tiles, [&](int64_t, int64_t slot) { out[slot] = Acc(0); });
            }
            const Range blocks = share(problem.blocks(), split, splits);
            for (int64_t block = blocks.begin; block < blocks.end; ++block)
                add_block(problem, panels[worker.index], block, mine, sums);
        }
        if (direct) return;
        worker.barrier();
        const Range entries = worker.share(plan.num_entries, kVectorBytes);
        const Range tiles = worker.share(plan.num_tiles);
        Acc* total = buffers.get();
        for (int64_t s = 1; s < splits; ++s) {
            const Acc* own = total + s * sums_of_split;
            add_all(own + entries.begin, entries.end - entries.begin, total + entries.begin);
            const int64_t first = plan.num_entries + tiles.begin * kTileEntries;
            add_all(own + first, (tiles.end - tiles.begin) * kTileEntries, total + first);
        }
        each_slot(entries, tiles, [&](int64_t place, int64_t slot) {
            out[slot] = accumulate ? out[slot] + total[place] : total[place];
        });
    });
}

}  // namespace

void sampled_grad(const void* dy, int64_t dy_stride, int64_t out_features, const void* x,
                  int64_t x_stride, int64_t in_features, bool packed, int64_t tokens, int64_t width,
                  const SampledEntries& plan, void* out, bool accumulate, DType dtype,
                  int threads) {
    if (plan.num_entries == 0 && plan.num_tiles == 0) return;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* activations = static_cast<const T*>(x);
        const Problem<T> problem{{static_cast<const T*>(dy), dy_stride, out_features, 0},
                                 {packed ? nullptr : activations, x_stride, in_features, 0},
                                 packed ? activations : nullptr,
                                 tokens,
                                 int(width),
                                 plan};
        run(problem, static_cast<Accumulator<T>*>(out), accumulate, threads);
    });
}

}  // namespace speft
