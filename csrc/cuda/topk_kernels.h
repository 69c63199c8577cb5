// topk_salience's kernels, in the order in which they run, until the k-th key is known, and all of
// them as one: topk_salience.cu says what for.
#pragma once

#include "topk_kept.h"
#include "topk_work.h"

namespace speft {
namespace cuda {

// An entry of a segment at a place as good as random within the j-th of as many equal parts as
// there are samples.
template <class T, bool kPair>
SPEFT_DEVICE uint32_t sampled_key(const Work& work, int which, int64_t size, int64_t j) {
    // As a power of two, for 64-bit numbers are divided by a hundred instructions.
    const int64_t bits = work.sizes.sample_bits;
    int64_t at = j;
    if (size >> bits > 0) {
        uint32_t mixed = uint32_t(j) * 0x9e3779b1u;
        mixed = (mixed ^ (mixed >> 15)) * 0x85ebca6bu;
        mixed ^= mixed >> 13;
        const int64_t start = j * size >> bits, width = ((j + 1) * size >> bits) - start;
        at = start + int64_t(uint64_t(width) * mixed >> 32);
    }
    const int number = work.sizes.together ? matrix_with(work.matrices, int(work.sizes.matrices),
                                                         &Matrix::start, at)
                                           : which;
    const Matrix& matrix = work.matrices[number];
    return key_at<T, kPair>(static_cast<const T*>(matrix.x), static_cast<const T*>(matrix.y),
                            at - matrix.start, work.score);
}

SPEFT_DEVICE void clear_sums(const Work& work, const Segment& segment) {
    for (int64_t i = threadIdx.x; i < groups_of(segment); i += kThreads)
        work.groups[segment.first_group + i] = 0;
    for (int64_t i = threadIdx.x; i < supers_of(segment); i += kThreads)
        work.supers[segment.first_super + i] = 0;
}

// Of a segment. It comes first, and so it also makes the state of each.
template <class T, bool kPair>
SPEFT_DEVICE void bound_segment(const Work& work, int which) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    uint32_t* const keys = bins + kBins;
    const Segment& segment = work.segments[which];
    clear<kListWords>(work.histograms + int64_t(which) * kListWords);
    clear_sums(work, segment);
    if (which == 0) {
        for (int64_t i = threadIdx.x; i <= work.sizes.matrices; i += kThreads)
            work.told[i] = i == 0 ? ~uint64_t(0) : 0;
        if (threadIdx.x == 0) work.pending[0] = 0;
    }

    uint32_t bound = ~0u;  // of a segment that has no list: no finite score reaches it
    if (segment.capacity > 0) {
        const int samples = int(smaller(segment.size, int64_t(1) << work.sizes.sample_bits));
        for (int first = int(threadIdx.x); first < samples; first += kThreads * kAhead) {
            uint32_t some[kAhead];  // asked for together, before the first is stored
            SPEFT_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int j = first + i * kThreads;
                some[i] = sampled_key<T, kPair>(work, which, segment.size, j < samples ? j : 0);
            }
            SPEFT_UNROLL
            for (int i = 0; i < kAhead; ++i)
                if (first + i * kThreads < samples) keys[first + i * kThreads] = some[i];
        }
        bound = 0;
        uint64_t rank = uint64_t(segment.sample_rank);
        for (int level = 0; level < kLevels; ++level) {
            const Digit digit = digit_of(level);
            clear<kBins>(bins);
            sync_block();  // the bins are empty
            for (int i = int(threadIdx.x); i < samples; i += kThreads)
                if (((keys[i] ^ bound) & digit.known) == 0)
                    atomic_add(&bins[digit.of(keys[i])], 1u);
            sync_block();  // and full
            const Pick picked = pick<kBins>(bins, rank, shared);
            bound |= picked.digit << digit.shift;
            rank = picked.rank;
        }
    }
    if (threadIdx.x == 0)
        work.states[which] = {0, uint64_t(segment.k), 0, bound, Source::kNone, {}};
}

// Grid: segments. As they are few, a multiprocessor need not hold several blocks, for which ptxas
// would save registers and spill.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 1)
find_bound(Work work) {
    bound_segment<T, kPair>(work, int(blockIdx.x));
}

// Entries of a tile that collect takes at a time: more are a cluster.
constexpr int kListed = 2048;

struct Collecting {
    uint32_t bins[kHighBins];
    union {
        uint8_t marks[kTileVectors];
        uint32_t keys[kListed];
    };
    uint16_t places[kListed];
    SumsOfBlock<kThreads, uint32_t> sums;
    uint64_t start;  // of the run, in its segment's list
};
constexpr uint16_t kFirst = 0x8000;  // beside a place: the first of its bin

// A tile's run has the order of its entries, so that what is kept of it has, too.
template <class T, bool kPair, int kUnderWay>
SPEFT_DEVICE void collect_tile(const Work& work, int64_t number) {
    Collecting& shared = *shared_memory<Collecting>();
    const int which = matrix_of_tile(work, number), ranked = segment_of(work, which);
    const Segment& segment = work.segments[ranked];
    State& state = work.states[ranked];
    const uint32_t bound = state.bound;
    const auto tile = tile_of<T, kPair>(work.matrices[which], number);
    clear<kHighBins>(shared.bins);
    if (!mark<kPair, kUnderWay>(tile, work.score, score_of(bound), shared.marks))
        atomic_min(&work.told[0], uint64_t(which));
    sync_block();  // the tile is marked, and the bins are empty

    // A thread lists what is marked of neighbouring vectors.
    constexpr int kOfThread = kTileVectors / kThreads;
    static_assert(kOfThread == 8, "the marks of a thread fill two words");
    const auto marks = reinterpret_cast<const Bytes8*>(shared.marks)[threadIdx.x];
    uint32_t left[2] = {marks.words[0], marks.words[1]}, total;
    uint32_t rank = sum_before<kThreads>(uint32_t(count_bits(left[0]) + count_bits(left[1])),
                                         shared.sums, &total);
    uint64_t start = 0;
    if (threadIdx.x == 0 && total > 0) start = atomic_add(&state.found, uint64_t(total));
    const auto fits = [&](uint64_t from) { return from + total <= uint64_t(segment.capacity); };
    uint32_t* const histogram = work.histograms + int64_t(ranked) * kListWords;
    static_assert(kTile<T> <= kFirst, "a place leaves a bit");
    for (uint32_t from = 0; from < total; from += kListed) {
        SPEFT_UNROLL
        for (int w = 0; w < 2; ++w) {
            const uint32_t first = (threadIdx.x * kOfThread + w * 4) * kVector<T>;
            for (; left[w] != 0 && rank < kListed; left[w] &= left[w] - 1) {
                const auto bit = uint32_t(lowest_bit(left[w]));
                shared.places[rank++] = uint16_t(first + bit / 8 * kVector<T> + bit % 8);
            }
        }
        rank -= kListed;  // of what is left, in the next list
        sync_block();     // what is marked is listed

        // It is read again, out of a cache, by as many threads as there is of it.
        const int here = int(smaller(total - from, kListed));
        SPEFT_UNROLL_BY(1)
        for (int i = int(threadIdx.x); i < here; i += kThreads) {
            const uint32_t key = key_at<T, kPair>(tile.x, tile.y, shared.places[i], work.score);
            shared.keys[i] = key;
            if (atomic_add(&shared.bins[high_digit(key - bound)], 1u) == 0)
                shared.places[i] |= kFirst;
        }
        if (threadIdx.x == 0) shared.start = start;
        sync_block();  // the run has its place, and the bins are full
        if (!fits(shared.start)) break;
        const int64_t run = segment.list + int64_t(shared.start) + from;
        SPEFT_UNROLL_BY(1)
        for (int i = int(threadIdx.x); i < here; i += kThreads) {
            const uint32_t key = shared.keys[i], place = shared.places[i];
            work.keys[run + i] = key;
            work.places[run + i] = uint16_t(place & ~uint32_t(kFirst));
            if ((place & kFirst) == 0) continue;
            const uint32_t digit = high_digit(key - bound);
            atomic_add(&histogram[digit], shared.bins[digit]);
            shared.bins[digit] = 0;
        }
        if (from + kListed < total) sync_block();  // the list is taken, and the bins are empty
    }
    if (threadIdx.x != 0) return;
    work.run_start[number] = segment.list + int64_t(start);
    work.run_length[number] = fits(start) ? total : 0;
}

// Grid: tiles.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, kPair ? 2 : 3)
collect(Work work) {
    collect_tile<T, kPair, kAhead>(work, blockIdx.x);
}

// The k-th largest key of a list, of which this is one of list_parts. Each block finds its high
// digit for itself, and adds up the low ones of those that share it; the last one finds the k-th's.
SPEFT_DEVICE void threshold_of_part(const Work& work, int number) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    const int parts = int(work.sizes.list_parts);
    const int which = number / parts, part = number % parts;
    const Segment& segment = work.segments[which];
    State& state = work.states[which];
    if (!is_listed(segment, state.found)) return;
    clear<kLowBins>(bins);
    uint32_t* const high = work.histograms + int64_t(which) * kListWords;
    uint32_t* const low = high + kHighBins;
    const Pick above = pick<kHighBins>(high, uint64_t(segment.k), shared);
    if (above.digit == kBeyond) return;

    const int64_t found = int64_t(state.found);
    const uint32_t least = state.bound + (above.digit << kLowBits);
    const auto* const keys = reinterpret_cast<const Bytes16*>(work.keys + segment.list);
    const int64_t step = int64_t(parts) * kThreads;
    for (int64_t first = int64_t(part) * kThreads + threadIdx.x; first * 4 < found;
         first += kAhead * step) {
        Bytes16 some[kAhead];  // asked for together, before the first is used
        SPEFT_UNROLL
        for (int v = 0; v < kAhead; ++v)
            if ((first + v * step) * 4 < found) some[v] = keys[first + v * step];
        SPEFT_UNROLL
        for (int i = 0; i < 4 * kAhead; ++i) {
            const uint32_t digit = some[i / 4].words[i % 4] - least;
            const bool there = (first + i / 4 * step) * 4 + i % 4 < found;
            if (there && digit < kLowBins) atomic_add(&bins[digit], 1u);
        }
    }
    sync_block();  // the bins are full
    for (int i = int(threadIdx.x); i < kLowBins; i += kThreads)
        if (bins[i] > 0) atomic_add(&low[i], bins[i]);
    if (!is_last(state.arrived.threshold, uint64_t(parts), &shared.found[0])) return;
    const Pick second = pick<kLowBins>(low, above.rank, shared);
    if (threadIdx.x == 0) {
        state.threshold = least + second.digit;
        state.rank = second.rank;
        state.source = Source::kList;
    }
}

// Grid: segments times list_parts.
static SPEFT_KERNEL(kThreads, 2) find_threshold(Work work) {
    threshold_of_part(work, int(blockIdx.x));
}

// For the segments whose k-th key is not known yet. Grid: segments.
static SPEFT_KERNEL(kThreads) start_over(Work work) {
    State& state = work.states[blockIdx.x];
    if (state.source != Source::kNone) return;
    clear<kListWords>(work.histograms + int64_t(blockIdx.x) * kListWords);
    sync_block();  // all have seen the state
    if (threadIdx.x != 0) return;
    state.source = Source::kData;
    work.pending[1 + atomic_add(&work.pending[0], 1u)] = blockIdx.x;
}

// Adds up one digit of those keys of a segment whose digits before are the k-th's. Which block
// comes last finds the k-th's digit. Grid: the pending segments times parts.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 2)
count_digit(Work work, int level, int parts) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    const int which = int(work.pending[1 + int(blockIdx.x) / parts]);
    const int part = int(blockIdx.x) % parts;
    const Segment& segment = work.segments[which];
    State& state = work.states[which];
    const uint32_t threshold = state.threshold;
    const Digit digit = digit_of(level);
    clear<kBins>(bins);
    sync_block();  // the bins are empty
    for (int64_t i = part; i < segment.tiles; i += parts) {
        const int64_t number = segment.first_tile + i;
        const int matrix = matrix_of_tile(work, number);
        visit<kPair, kThreads>(
            tile_of<T, kPair>(work.matrices[matrix], number), work.score, [&](const auto& entries) {
                SPEFT_UNROLL
                for (int j = 0; j < kVector<T>; ++j)
                    if (j < entries.count && ((entries.keys[j] ^ threshold) & digit.known) == 0)
                        atomic_add(&bins[digit.of(entries.keys[j])], 1u);
            });
    }
    sync_block();  // and full
    auto* const histogram =
        reinterpret_cast<uint64_t*>(work.histograms + int64_t(which) * kListWords) + level * kBins;
    for (int i = int(threadIdx.x); i < digit.bins; i += kThreads)
        if (bins[i] > 0) atomic_add(&histogram[i], uint64_t(bins[i]));
    if (!is_last(state.arrived.digit[level], uint64_t(parts), &shared.found[0])) return;
    // Of the last digit the upper half of the bins is empty.
    const Pick picked = pick<kBins>(histogram, state.rank, shared);
    if (threadIdx.x == 0) {
        state.threshold = threshold | picked.digit << digit.shift;
        state.rank = picked.rank;
    }
}

// Calls f(number) for those of `count` that are this block's, by all of its threads. Each has the
// block's shared memory to itself. What is made of a number is made in its turn, for registers are
// short.
template <class F>
SPEFT_DEVICE void each_of_grid(int64_t count, F&& f) {
    SPEFT_UNROLL_BY(1)
    for (uint32_t i = afresh(blockIdx.x); i < count; i = afresh(i + gridDim.x)) {
        f(i);
        sync_block();  // the next one's may be written
    }
}

// All of this for lists, by blocks that stay. Half as many vectors under way leave registers for
// what a loop over tiles keeps.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 2)
select_resident(Work work) {
    const TopkSizes& sizes = work.sizes;
    using From = OfList<kTile<T>>;
    constexpr int kTiles = kThreads / kWarp;
    // Of few tiles each block takes as many.
    const int some = int(smaller(kTiles, parts_of(sizes.tiles, gridDim.x)));
    each_of_grid(sizes.segments, [&](int64_t i) { bound_segment<T, kPair>(work, int(i)); });
    sync_grid();  // each segment has its bound
    each_of_grid(sizes.tiles, [&](int64_t i) { collect_tile<T, kPair, kAhead / 2>(work, i); });
    sync_grid();  // what reaches it is set aside
    each_of_grid(sizes.segments * sizes.list_parts,
                 [&](int64_t i) { threshold_of_part(work, int(i)); });
    sync_grid();  // each segment has its threshold
    each_of_grid(parts_of(sizes.tiles, some), [&](int64_t i) {
        if (warp_id() < some) count_tile<From>(work, i * some + warp_id());
    });
    sync_grid();  // what is kept is counted
    each_of_grid(parts_of(sizes.tiles, some),
                 [&](int64_t i) { write_tiles<From, kTiles>(work, i * some, some); });
}

}  // namespace cuda
}  // namespace speft
