// topk_salience's last two kernels, which know the k-th key: what is kept is counted, and written.
#pragma once

#include "topk_work.h"

namespace speft {
namespace cuda {

constexpr int kFew = 256;  // threads that take a tile by the warp
constexpr int kFewTiles = kFew / kWarp;

// What of a tile was set aside. visit calls f(entries) by the warp, in the order of the tile.
template <int kEntries>
struct OfList {
    static constexpr Source kSource = Source::kList;
    static constexpr int kTile = kEntries;
    template <class F>
    static SPEFT_DEVICE void visit(const Work& work, int, int64_t number, F&& f) {
        const int64_t start = work.run_start[number];
        const int length = int(work.run_length[number]);
        for (int first = lane_id(); first - lane_id() < length; first += kAhead * kWarp) {
            Entries<1> some[kAhead] = {};  // asked for together, before the first is used
            SPEFT_UNROLL
            for (int v = 0; v < kAhead; ++v) {
                const int64_t at = start + first + v * kWarp;
                if (first + v * kWarp < length)
                    some[v] = {{work.keys[at]}, int(work.places[at]), 1};
            }
            for (int v = 0; v < kAhead; ++v)
                if (first - lane_id() + v * kWarp < length) f(some[v]);
        }
    }
};

// All its entries.
template <class T, bool kPair>
struct OfData {
    static constexpr Source kSource = Source::kData;
    static constexpr int kTile = cuda::kTile<T>;
    template <class F>
    static SPEFT_DEVICE void visit(const Work& work, int which, int64_t number, F&& f) {
        cuda::visit<kPair, kWarp>(tile_of<T, kPair>(work.matrices[which], number), work.score, f);
    }
};

// How many of them are above the k-th key, and equal it.
template <int kMost>
SPEFT_DEVICE uint32_t counts_of(const Entries<kMost>& entries, uint32_t threshold) {
    uint32_t counts = 0;
    SPEFT_UNROLL
    for (int i = 0; i < kMost; ++i)
        if (i < entries.count)
            counts += entries.keys[i] > threshold    ? 1u
                      : entries.keys[i] == threshold ? 1u << 16
                                                     : 0u;
    return counts;
}

// By the warp.
template <class From>
SPEFT_DEVICE void count_tile(const Work& work, int64_t number) {
    if (number >= work.sizes.tiles) return;
    const int which = matrix_of_tile(work, number);
    const Segment& segment = work.segments[segment_of(work, which)];
    const State& state = work.states[segment_of(work, which)];
    if (state.source != From::kSource) return;
    const uint32_t threshold = state.threshold;
    static_assert(From::kTile < 1 << 16, "two counts of a tile fit one number");
    uint32_t counts = 0, total;
    From::visit(work, which, number,
                [&](const auto& entries) { counts += counts_of(entries, threshold); });
    sum_before_in_warp(counts, &total);
    if (lane_id() != 0) return;
    work.kept[number] = total;
    if (total == 0) return;
    const int64_t tile = number - segment.first_tile;
    atomic_add(&work.groups[segment.first_group + tile / kGroup], widened_counts(total));
    if (segment.tiles > kSuper)
        atomic_add(&work.supers[segment.first_super + tile / kSuper], widened_counts(total));
}

// Grid: tiles, kFewTiles of them each.
template <class From>
SPEFT_KERNEL(kFew, 2)
count_kept(Work work) {
    count_tile<From>(work, int64_t(blockIdx.x) * kFewTiles + warp_id());
}

struct Kept {
    uint64_t above, equal;
};

// Of all tiles of the segment before this one. A warp's lanes come together.
SPEFT_DEVICE Kept kept_before(const Work& work, const Segment& segment, int64_t number) {
    const int64_t tile = number - segment.first_tile;
    uint64_t counts = 0;  // within a super
    for (int64_t i = tile / kGroup * kGroup + lane_id(); i < tile; i += kWarp)
        counts += widened_counts(work.kept[segment.first_tile + i]);
    for (int64_t i = tile / kSuper * kGroup + lane_id(); i < tile / kGroup; i += kWarp)
        counts += work.groups[segment.first_group + i];
    uint64_t sums;
    sum_before_in_warp(counts, &sums);
    Kept before = {uint32_t(sums), sums >> 32};
    if (tile < kSuper) return before;
    Kept mine = {}, all;
    for (int64_t i = lane_id(); i < tile / kSuper; i += kWarp) {
        const uint64_t of_super = work.supers[segment.first_super + i];
        mine.above += uint32_t(of_super);
        mine.equal += of_super >> 32;
    }
    sum_before_in_warp(mine.above, &all.above);
    sum_before_in_warp(mine.equal, &all.equal);
    return {before.above + all.above, before.equal + all.equal};
}

// Writes the indices of what is kept of a tile, by the warp; returns how many.
template <class From>
SPEFT_DEVICE uint64_t write_tile(const Work& work, int64_t number, int which) {
    const Matrix& matrix = work.matrices[which];
    const Segment& segment = work.segments[segment_of(work, which)];
    const State& state = work.states[segment_of(work, which)];
    if (state.source != From::kSource) return 0;
    const uint32_t own = work.kept[number];
    if (own == 0) return 0;
    const uint32_t threshold = state.threshold;
    Kept before = kept_before(work, segment, number);

    // Of the keys equal to the k-th, the first `ties` of the segment are kept.
    const uint64_t ties = state.rank;
    const auto tied = [&](uint64_t equal) { return equal < ties ? equal : ties; };
    const uint64_t keeps = (own & 0xffff) + tied(before.equal + (own >> 16)) - tied(before.equal);
    if (keeps == 0) return 0;
    const int64_t start = (number - matrix.first_tile) * From::kTile;
    From::visit(work, which, number, [&](const auto& entries) {
        uint32_t total;
        const uint32_t earlier = sum_before_in_warp(counts_of(entries, threshold), &total);
        uint64_t tie = before.equal + (earlier >> 16);
        int64_t at = segment.out + int64_t(before.above + (earlier & 0xffff) + tied(tie));
        SPEFT_UNROLL
        for (int i = 0; i < int(sizeof(entries.keys) / sizeof(uint32_t)); ++i) {
            const uint32_t key = entries.keys[i];
            if (i >= entries.count || key < threshold) continue;
            if (key == threshold && tie++ >= ties) continue;
            work.indices[at++] = start + entries.place + i;
        }
        before.above += total & 0xffff;
        before.equal += total >> 16;
    });
    return keeps;
}

// What the tiles of a block tell each other.
template <int kTiles>
struct Told {
    uint64_t keeps[kTiles];
    int matrix[kTiles];
};

// Of `count` tiles from the first on, at most as many as a block has warps.
template <class From, int kTiles>
SPEFT_DEVICE void write_tiles(const Work& work, int64_t first, int count) {
    auto& told = *shared_memory<Told<kTiles>>();
    const int64_t number = first + warp_id();
    const bool mine = warp_id() < count && number < work.sizes.tiles;
    const int which = mine ? matrix_of_tile(work, number) : -1;
    const uint64_t keeps = which < 0 ? 0 : write_tile<From>(work, number, which);
    if (lane_id() == 0) {
        told.keeps[warp_id()] = keeps;
        told.matrix[warp_id()] = which;
    }
    sync_block();  // each tile has told
    // Of neighbours of a matrix one adds for all: else thousands would wait for one number.
    const int i = int(threadIdx.x);
    if (i >= kTiles || (i > 0 && told.matrix[i] == told.matrix[i - 1])) return;
    uint64_t all = 0;
    for (int j = i; j < kTiles && told.matrix[j] == told.matrix[i]; ++j)
        all += told.keeps[j];
    if (all > 0) atomic_add(&work.told[1 + told.matrix[i]], all);
}

// Grid: tiles, kFewTiles of them each.
template <class From>
SPEFT_KERNEL(kFew, 2)
write_kept(Work work) {
    write_tiles<From, kFewTiles>(work, int64_t(blockIdx.x) * kFewTiles, kFewTiles);
}

}  // namespace cuda
}  // namespace speft
