// topk_salience's kernels, in the order in which they run: topk_salience.cu says what for.
#pragma once

#include "topk_work.h"

namespace speft {
namespace cuda {

constexpr int kFew = 128;  // threads for a tile's run, of some hundred entries

// An entry of a segment at a place as good as random within the j-th of `samples` equal parts.
template <class T, bool kPair>
SPEFT_DEVICE uint32_t sampled_key(const Work& work, int64_t size, int64_t j) {
    const int64_t samples = work.sizes.samples;
    int64_t at = j;
    if (size > samples) {
        uint32_t mixed = uint32_t(j) * 0x9e3779b1u;
        mixed = (mixed ^ (mixed >> 15)) * 0x85ebca6bu;
        mixed ^= mixed >> 13;
        const int64_t start = j * size / samples, width = (j + 1) * size / samples - start;
        at = start + int64_t(uint64_t(width) * mixed >> 32);
    }
    const int number = work.sizes.together ? matrix_with(work.matrices, int(work.sizes.matrices),
                                                         &Matrix::start, at)
                                           : int(blockIdx.x);
    const Matrix& matrix = work.matrices[number];
    return key_at<T, kPair>(static_cast<const T*>(matrix.x), static_cast<const T*>(matrix.y),
                            at - matrix.start, work.score);
}

// The sums of a segment's groups are zero.
SPEFT_DEVICE void clear_groups(const Work& work, const Segment& segment) {
    for (int64_t i = threadIdx.x; i < groups_of(segment); i += kThreads)
        work.groups[segment.first_group + i] = {0, 0};
}

// Grid: segments. It comes first, and so it also makes the state of each. As they are few, a
// multiprocessor need not hold several blocks, for which ptxas would save registers and spill.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 1)
find_bound(Work work) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    uint32_t* const keys = bins + kBins;
    const Segment& segment = work.segments[blockIdx.x];
    clear<kListWords>(work.histograms + int64_t(blockIdx.x) * kListWords);
    clear_groups(work, segment);
    if (blockIdx.x == 0)
        for (int64_t i = threadIdx.x; i <= work.sizes.matrices; i += kThreads)
            work.told[i] = i == 0 ? ~uint64_t(0) : 0;

    uint32_t bound = ~0u;  // of a segment that has no list: no finite score reaches it
    if (segment.capacity > 0) {
        const int samples =
            int(segment.size < work.sizes.samples ? segment.size : work.sizes.samples);
        for (int first = int(threadIdx.x); first < samples; first += kThreads * kAhead) {
            uint32_t some[kAhead];  // asked for together, before the first is stored
            SPEFT_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int j = first + i * kThreads;
                some[i] = sampled_key<T, kPair>(work, segment.size, j < samples ? j : 0);
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
        work.states[blockIdx.x] = {0, uint64_t(segment.k), 0, bound, Source::kNone, {}};
}

// Grid: tiles.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads)
collect(Work work) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    const int64_t number = blockIdx.x;
    const int which = matrix_of_tile(work, number), ranked = segment_of(work, which);
    const Segment& segment = work.segments[ranked];
    State& state = work.states[ranked];
    const uint32_t bound = state.bound;
    const auto tile = tile_of<T, kPair>(work.matrices[which], number);
    clear<kHighBins>(bins);

    uint32_t hits = 0, worst = 0;
    visit<kPair, kThreads>(tile, work.score, [&](int slot, int, uint32_t key) {
        hits |= uint32_t(key >= bound) << slot;
        worst = worst > key - kLeast ? worst : key - kLeast;
    });
    if (worst > kSpan) atomic_min(&work.told[0], uint64_t(which));

    uint32_t total;
    const uint32_t before =
        sum_before<kThreads>(uint32_t(count_bits(hits)), shared.short_sums, &total);
    if (threadIdx.x == 0) {
        const uint64_t start = total > 0 ? atomic_add(&state.found, uint64_t(total)) : 0;
        const bool fits = start + total <= uint64_t(segment.capacity);
        shared.found[0] = uint64_t(segment.list) + start;
        shared.found[1] = fits;
        work.run_start[number] = segment.list + int64_t(start);
        work.run_length[number] = fits ? total : 0;
    }
    sync_block();  // the run has its place, and the bins are empty
    if (!shared.found[1]) return;
    // One entry in a hundred: it is read again, out of a cache, rather than kept in registers.
    const auto key_of_slot = [&](int slot) {
        return key_at<T, kPair>(tile.x, tile.y, place_of<T, kThreads>(slot), work.score);
    };
    uint64_t at = shared.found[0] + before;
    uint32_t firsts = 0;  // the slots that were the first of their bin
    for (; hits != 0; hits &= hits - 1) {
        const int slot = lowest_bit(hits);
        const uint32_t key = key_of_slot(slot);
        work.keys[at] = key;
        work.places[at++] = uint16_t(place_of<T, kThreads>(slot));
        if (atomic_add(&bins[high_digit(key - bound)], 1u) == 0) firsts |= 1u << slot;
    }
    sync_block();  // the bins are full
    uint32_t* const histogram = work.histograms + int64_t(ranked) * kListWords;
    for (; firsts != 0; firsts &= firsts - 1) {
        const uint32_t digit = high_digit(key_of_slot(lowest_bit(firsts)) - bound);
        atomic_add(&histogram[digit], bins[digit]);
    }
}

// The k-th largest key of each list. Each block finds its high digit for itself, and adds up the
// low ones of those that share it; the last block of a segment finds the k-th's.
// Grid: segments times list_parts.
static SPEFT_KERNEL(kThreads, 2) find_threshold(Work work) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    const int parts = int(work.sizes.list_parts);
    const int which = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts;
    const Segment& segment = work.segments[which];
    State& state = work.states[which];
    if (!is_listed(segment, state.found)) return;
    clear<kLowBins>(bins);
    uint32_t* const high = work.histograms + int64_t(which) * kListWords;
    uint32_t* const low = high + kHighBins;
    const Pick first = pick<kHighBins>(high, uint64_t(segment.k), shared);
    if (first.digit == kBeyond) return;

    const int64_t found = int64_t(state.found);
    const uint32_t least = state.bound + (first.digit << kLowBits);
    for (int64_t i = (int64_t(part) * kThreads + threadIdx.x) * 4; i < found;
         i += int64_t(parts) * kThreads * 4) {
        const Bytes16 four = *reinterpret_cast<const Bytes16*>(work.keys + segment.list + i);
        SPEFT_UNROLL
        for (int j = 0; j < 4; ++j) {
            const uint32_t digit = four.words[j] - least;
            if (i + j < found && digit < kLowBins) atomic_add(&bins[digit], 1u);
        }
    }
    sync_block();  // the bins are full
    for (int i = int(threadIdx.x); i < kLowBins; i += kThreads)
        if (bins[i] > 0) atomic_add(&low[i], bins[i]);
    if (!is_last(state.arrived.threshold, uint64_t(parts), &shared.found[0])) return;
    const Pick second = pick<kLowBins>(low, first.rank, shared);
    if (threadIdx.x == 0) {
        state.threshold = least + second.digit;
        state.rank = second.rank;
        state.source = Source::kList;
    }
}

// What find_bound did, for the segments whose k-th key is not known yet. Grid: segments.
static SPEFT_KERNEL(kThreads) start_over(Work work) {
    State& state = work.states[blockIdx.x];
    if (state.source != Source::kNone) return;
    clear<kListWords>(work.histograms + int64_t(blockIdx.x) * kListWords);
    clear_groups(work, work.segments[blockIdx.x]);
    sync_block();  // all have seen the state
    if (threadIdx.x == 0) state.source = Source::kData;
}

// Adds up one digit of those keys of a segment whose digits before are the k-th's. Which block
// comes last finds the k-th's digit. Grid: segments times parts.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 2)
count_digit(Work work, int level) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const bins = shared.bins();
    const int parts = int(work.sizes.parts);
    const int which = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts;
    const Segment& segment = work.segments[which];
    State& state = work.states[which];
    if (state.source != Source::kData) return;
    const uint32_t threshold = state.threshold;
    const Digit digit = digit_of(level);
    clear<kBins>(bins);
    sync_block();  // the bins are empty
    for (int64_t i = part; i < segment.tiles; i += parts) {
        const int64_t number = segment.first_tile + i;
        const int matrix = matrix_of_tile(work, number);
        visit<kPair, kThreads>(tile_of<T, kPair>(work.matrices[matrix], number), work.score,
                               [&](int, int, uint32_t key) {
                                   if (((key ^ threshold) & digit.known) == 0)
                                       atomic_add(&bins[digit.of(key)], 1u);
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

// What of a tile was set aside: visit calls f(place, key).
template <int kEntries>
struct OfList {
    static constexpr Source kSource = Source::kList;
    static constexpr int kTile = kEntries;
    template <class F>
    static SPEFT_DEVICE void visit(const Work& work, int, int64_t number, F&& f) {
        const int64_t start = work.run_start[number];
        for (uint32_t i = threadIdx.x; i < work.run_length[number]; i += kFew)
            f(int(work.places[start + i]), work.keys[start + i]);
    }
};

// All its entries.
template <class T, bool kPair>
struct OfData {
    static constexpr Source kSource = Source::kData;
    static constexpr int kTile = cuda::kTile<T>;
    template <class F>
    static SPEFT_DEVICE void visit(const Work& work, int which, int64_t number, F&& f) {
        cuda::visit<kPair, kFew>(tile_of<T, kPair>(work.matrices[which], number), work.score,
                                 [&](int, int place, uint32_t key) { f(place, key); });
    }
};

struct SharedOfFew {
    union {
        SumsOfBlock<kFew, uint32_t> short_sums;
        SumsOfBlock<kFew, uint64_t> sums;
    };
    SumsOfBlock<kFew, uint64_t> more_sums;
    uint64_t told;
};

// How many keys of each tile are above the k-th, and equal it. The last block of a segment adds up
// its groups. Grid: tiles.
template <class From>
SPEFT_KERNEL(kFew, 4)
count_kept(Work work) {
    SharedOfFew& shared = *shared_memory<SharedOfFew>();
    const int64_t number = blockIdx.x;
    const int which = matrix_of_tile(work, number);
    const Segment& segment = work.segments[segment_of(work, which)];
    State& state = work.states[segment_of(work, which)];
    if (state.source != From::kSource) return;
    const uint32_t threshold = state.threshold;
    static_assert(From::kTile < 1 << 16, "two counts of a tile fit one number");
    uint32_t counts = 0, total;
    From::visit(work, which, number, [&](int, uint32_t key) {
        counts += key > threshold ? 1u : key == threshold ? 1u << 16 : 0u;
    });
    sum_before<kFew>(counts, shared.short_sums, &total);
    if (threadIdx.x == 0) {
        work.kept[number] = total;
        Kept& group = work.groups[group_of_tile(segment, number)];
        atomic_add(&group.above, uint64_t(total & 0xffff));
        atomic_add(&group.equal, uint64_t(total >> 16));
    }
    if (!is_last(state.arrived.kept, uint64_t(segment.tiles), &shared.told)) return;
    const int64_t count = groups_of(segment), each = parts_of(count, kFew);
    const int64_t begin = smaller(threadIdx.x * each, count), end = smaller(begin + each, count);
    Kept* const groups = work.groups + segment.first_group;
    Kept sums = {0, 0};
    for (int64_t i = begin; i < end; ++i) {
        sums.above += groups[i].above;
        sums.equal += groups[i].equal;
    }
    uint64_t all;
    Kept before = {sum_before<kFew>(sums.above, shared.sums, &all),
                   sum_before<kFew>(sums.equal, shared.more_sums, &all)};
    for (int64_t i = begin; i < end; ++i) {
        const Kept own = groups[i];
        groups[i] = before;
        before.above += own.above;
        before.equal += own.equal;
    }
}

// Grid: tiles.
template <class From>
SPEFT_KERNEL(kFew, 4)
write_kept(Work work) {
    constexpr int kWords = From::kTile / 32;
    constexpr int kEach = kWords / kFew;
    SharedOfFew& shared = *shared_memory<SharedOfFew>();
    const int64_t number = blockIdx.x;
    const int which = matrix_of_tile(work, number);
    const Matrix& matrix = work.matrices[which];
    const Segment& segment = work.segments[segment_of(work, which)];
    const State& state = work.states[segment_of(work, which)];
    if (state.source != From::kSource) return;
    const uint32_t own = work.kept[number];
    if (own == 0) return;
    const uint32_t threshold = state.threshold;

    // A group's counts fit 32 bits each.
    const int64_t in_group = (number - segment.first_tile) % kGroup;
    uint64_t sums = 0, all;
    for (int64_t i = number - in_group + threadIdx.x; i < number; i += kFew)
        sums += uint64_t(work.kept[i] & 0xffff) | uint64_t(work.kept[i] >> 16) << 32;
    sum_before<kFew>(sums, shared.sums, &all);
    Kept before = work.groups[group_of_tile(segment, number)];
    before.above += uint32_t(all);
    before.equal += all >> 32;

    // Of the keys equal to the k-th, the first `ties` of the segment are kept.
    const uint64_t ties = state.rank, last = before.equal + (own >> 16);
    const uint64_t tied_before = before.equal < ties ? before.equal : ties;
    const uint64_t keeps = (own & 0xffff) + (last < ties ? last : ties) - tied_before;
    if (keeps == 0) return;
    if (threadIdx.x == 0) atomic_add(&work.told[1 + which], keeps);

    // A bit for each entry puts them in order, whoever brings them.
    uint32_t* const larger = reinterpret_cast<uint32_t*>(&shared + 1);
    uint32_t* const tied = larger + kWords;
    for (int i = int(threadIdx.x); i < 2 * kWords; i += kFew)
        larger[i] = 0;
    sync_block();  // no bit is set
    From::visit(work, which, number, [&](int place, uint32_t key) {
        if (key < threshold) return;
        uint32_t* const bits = key > threshold ? larger : tied;
        atomic_add(&bits[place / 32], 1u << (place % 32));
    });
    sync_block();  // every bit is

    const int word = int(threadIdx.x) * kEach;
    uint32_t counts = 0, total;
    for (int i = word; i < word + kEach; ++i)
        counts += uint32_t(count_bits(larger[i])) + (uint32_t(count_bits(tied[i])) << 16);
    const uint32_t earlier = sum_before<kFew>(counts, shared.short_sums, &total);
    uint64_t tie = before.equal + (earlier >> 16);
    int64_t at =
        segment.out + int64_t(before.above + (earlier & 0xffff) + (tie < ties ? tie : ties));
    const int64_t start = (number - matrix.first_tile) * From::kTile;
    for (int i = word; i < word + kEach; ++i) {
        for (uint32_t bits = larger[i] | tied[i]; bits != 0; bits &= bits - 1) {
            const int bit = lowest_bit(bits);
            if ((tied[i] >> bit & 1) != 0 && tie++ >= ties) continue;
            work.indices[at++] = start + i * 32 + bit;
        }
    }
}

}  // namespace cuda
}  // namespace speft
