// topk_salience's kernels, in the order in which they run: topk_salience.cu says what for.
#pragma once

#include "topk_work.h"

namespace speft {
namespace cuda {

constexpr int kFew = 128;  // threads for a tile's run, of some hundred entries
using SumsOfFew = SumsOfBlock<kFew, uint32_t>;

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

// Grid: segments. It comes first, and so it also makes the state of each. As they are few, a
// multiprocessor need not hold several blocks, for which ptxas would save registers and spill.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads, 1)
find_bound(Work work) {
    Shared& shared = *shared_memory<Shared>();
    uint32_t* const keys = reinterpret_cast<uint32_t*>(&shared + 1);
    const Segment& segment = work.segments[blockIdx.x];
    for (int i = int(threadIdx.x); i < kLevels * kBins; i += kThreads)
        work.histograms[int64_t(blockIdx.x) * kLevels * kBins + i] = 0;
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
            for (int i = int(threadIdx.x); i < digit.bins; i += kThreads)
                shared.bins[i] = 0;
            sync_block();  // the bins are empty
            for (int i = int(threadIdx.x); i < samples; i += kThreads)
                if (((keys[i] ^ bound) & digit.known) == 0)
                    atomic_add(&shared.bins[digit.of(keys[i])], 1u);
            sync_block();  // and full
            const Pick picked = pick(shared.bins, digit.bins, rank, shared);
            bound |= picked.digit << digit.shift;
            rank = picked.rank;
        }
    }
    if (threadIdx.x == 0) work.states[blockIdx.x] = {0, uint64_t(segment.k), 0, bound, 0};
}

// Grid: tiles.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads)
collect(Work work) {
    Shared& shared = *shared_memory<Shared>();
    const int64_t number = blockIdx.x;
    const int which = matrix_of_tile(work, number);
    const Segment& segment = work.segments[segment_of(work, which)];
    State& state = work.states[segment_of(work, which)];
    const uint32_t bound = state.bound;
    const auto tile = tile_of<T, kPair>(work.matrices[which], number);

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
    sync_block();  // the run has its place
    if (!shared.found[1]) return;
    uint64_t at = shared.found[0] + before;
    // One entry in a hundred: it is read again, out of a cache, rather than kept in registers.
    for (; hits != 0; hits &= hits - 1) {
        const int place = place_of<T, kThreads>(lowest_bit(hits));
        work.keys[at] = key_at<T, kPair>(tile.x, tile.y, place, work.score);
        work.places[at++] = uint16_t(place);
    }
}

// Adds up one digit of those keys of a segment whose digits before are the k-th's. Which block
// comes last finds the k-th's digit. Grid: segments times parts.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads)
count_digit(Work work, int level) {
    Shared& shared = *shared_memory<Shared>();
    const int parts = int(work.sizes.parts);
    const int which = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts;
    const Segment& segment = work.segments[which];
    State& state = work.states[which];
    const uint32_t threshold = state.threshold;
    const Digit digit = digit_of(level);
    for (int i = int(threadIdx.x); i < digit.bins; i += kThreads)
        shared.bins[i] = 0;
    sync_block();  // the bins are empty
    const auto add = [&](uint32_t key) {
        if (((key ^ threshold) & digit.known) == 0) atomic_add(&shared.bins[digit.of(key)], 1u);
    };
    if (is_listed(segment, state)) {
        const int64_t found = int64_t(state.found);
        for (int64_t i = (int64_t(part) * kThreads + threadIdx.x) * 4; i < found;
             i += int64_t(parts) * kThreads * 4) {
            const Bytes16 four = *reinterpret_cast<const Bytes16*>(work.keys + segment.list + i);
            SPEFT_UNROLL
            for (int j = 0; j < 4; ++j)
                if (i + j < found) add(four.words[j]);
        }
    } else {
        for (int64_t i = part; i < segment.tiles; i += parts) {
            const int64_t number = segment.first_tile + i;
            const int matrix = matrix_of_tile(work, number);
            visit<kPair, kThreads>(tile_of<T, kPair>(work.matrices[matrix], number), work.score,
                                   [&](int, int, uint32_t key) { add(key); });
        }
    }
    sync_block();  // and full
    uint64_t* const histogram = work.histograms + (int64_t(which) * kLevels + level) * kBins;
    for (int i = int(threadIdx.x); i < digit.bins; i += kThreads)
        if (shared.bins[i] > 0) atomic_add(&histogram[i], uint64_t(shared.bins[i]));

    sync_block();  // the block's part is in the histogram
    if (threadIdx.x == 0) {
        // One thread's fences do for its block: barriers hand on what they order.
        fence();
        shared.found[0] = atomic_add(&state.arrived, 1u) + 1;
        fence();
    }
    sync_block();  // all know whether theirs was the last
    if (shared.found[0] != uint64_t(parts)) return;
    const Pick picked = pick(histogram, digit.bins, state.rank, shared);
    if (threadIdx.x == 0) {
        state.threshold = threshold | picked.digit << digit.shift;
        state.rank = picked.rank;
        state.arrived = 0;
    }
}

// Calls f(place, key) for what of a tile was set aside, or for all its entries.
template <class T, bool kPair, class F>
SPEFT_DEVICE void visit_candidates(const Work& work, const Matrix& matrix, int64_t number,
                                   bool listed, F&& f) {
    if (listed) {
        const int64_t start = work.run_start[number];
        for (uint32_t i = threadIdx.x; i < work.run_length[number]; i += kFew)
            f(int(work.places[start + i]), work.keys[start + i]);
    } else {
        visit<kPair, kFew>(tile_of<T, kPair>(matrix, number), work.score,
                           [&](int, int place, uint32_t key) { f(place, key); });
    }
}

// Grid: tiles.
template <class T, bool kPair>
SPEFT_KERNEL(kFew)
count_kept(Work work) {
    const int64_t number = blockIdx.x, tiles = work.sizes.tiles;
    const int which = matrix_of_tile(work, number);
    const State& state = work.states[segment_of(work, which)];
    const uint32_t threshold = state.threshold;
    static_assert(kTile<T> < 1 << 16, "two counts of a tile fit one number");
    uint32_t counts = 0, total;
    visit_candidates<T, kPair>(
        work, work.matrices[which], number,
        is_listed(work.segments[segment_of(work, which)], state), [&](int, uint32_t key) {
            counts += key > threshold ? 1u : key == threshold ? 1u << 16 : 0u;
        });
    sum_before<kFew>(counts, *shared_memory<SumsOfFew>(), &total);
    if (threadIdx.x != 0) return;
    work.kept[number] = total & 0xffff;
    work.kept[tiles + number] = total >> 16;
    if (number == 0) work.kept[2 * tiles] = 0;
}

// Grid: tiles.
template <class T, bool kPair>
SPEFT_KERNEL(kFew)
write_kept(Work work) {
    constexpr int kWords = kTile<T> / 32;
    constexpr int kEach = kWords / kFew;
    const int64_t number = blockIdx.x;
    const int which = matrix_of_tile(work, number);
    const Matrix& matrix = work.matrices[which];
    const Segment& segment = work.segments[segment_of(work, which)];
    const State& state = work.states[segment_of(work, which)];
    const uint32_t threshold = state.threshold;

    // Of the keys equal to the k-th, the first `ties` of the segment are kept.
    const int64_t* const above = work.kept;
    const int64_t* const equal = work.kept + work.sizes.tiles;
    const int64_t ties = int64_t(state.rank);
    const int64_t first = equal[number] - equal[segment.first_tile];
    const int64_t last = equal[number + 1] - equal[segment.first_tile];
    const int64_t keeps = above[number + 1] - above[number] +
                          ((last < ties ? last : ties) - (first < ties ? first : ties));
    if (keeps == 0) return;
    if (threadIdx.x == 0) atomic_add(&work.told[1 + which], uint64_t(keeps));

    // A bit for each entry puts them in order, whoever brings them.
    uint32_t* const larger = shared_memory<uint32_t>();
    uint32_t* const tied = larger + kWords;
    for (int i = int(threadIdx.x); i < 2 * kWords; i += kFew)
        larger[i] = 0;
    sync_block();  // no bit is set
    visit_candidates<T, kPair>(work, matrix, number, is_listed(segment, state),
                               [&](int place, uint32_t key) {
                                   if (key < threshold) return;
                                   uint32_t* const bits = key > threshold ? larger : tied;
                                   atomic_add(&bits[place / 32], 1u << (place % 32));
                               });
    sync_block();  // every bit is

    const int word = int(threadIdx.x) * kEach;
    uint32_t counts = 0, total;
    for (int i = word; i < word + kEach; ++i)
        counts += uint32_t(count_bits(larger[i])) + (uint32_t(count_bits(tied[i])) << 16);
    const uint32_t before =
        sum_before<kFew>(counts, *reinterpret_cast<SumsOfFew*>(tied + kWords), &total);
    int64_t tie = first + (before >> 16);
    int64_t at = segment.out + above[number] - above[segment.first_tile] + (before & 0xffff) +
                 (tie < ties ? tie : ties);
    const int64_t start = (number - matrix.first_tile) * kTile<T>;
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
