// What topk_salience's kernels share: sizes, the device's findings, and the scratch.
#pragma once

#include "kernels.h"
#include "radix.h"

namespace speft {
namespace cuda {

struct Segment {
    int64_t k;
    int64_t size;
    int64_t first_tile;
    int64_t tiles;
    int64_t first_group;
    int64_t first_super;
    int64_t sample_rank;  // of the bound, among the samples
    int64_t capacity;     // entries that may be set aside
    int64_t list;         // the first one's place
    int64_t out;          // the first index's place
};

// Tiles of a segment whose counts have a sum of their own, and groups of these: so no tile adds up
// the counts of all before it.
constexpr int kGroup = 64, kSuper = kGroup * kGroup;

SPEFT_BOTH int64_t groups_of(const Segment& segment) {
    return parts_of(segment.tiles, kGroup);
}

SPEFT_BOTH int64_t supers_of(const Segment& segment) {
    return parts_of(segment.tiles, kSuper);
}

// What a segment's k-th key was found in.
enum class Source : uint32_t { kNone, kList, kData };

// What the device finds out about a segment.
struct State {
    uint64_t found;      // entries at or above the bound
    uint64_t rank;       // of the k-th key among those that share the digits known; then: ties kept
    uint32_t threshold;  // the digits known of the k-th largest key, then zeros; then: that key
    uint32_t bound;
    Source source;
    // Blocks that have added their part, of each kernel that the last of them ends.
    struct {
        uint32_t threshold, digit[kLevels];
    } arrived;
};

// Of a segment: the high and then the low digits of its list, or the digits of all its data.
constexpr int kListWords = kHighBins + kLowBins;
static_assert(kLevels * kBins * sizeof(uint64_t) <= kListWords * sizeof(uint32_t), "one memory");

// Two counts in one number: of keys above the k-th, and of those equal to it. Of tiles they have 16
// bits each, of sums 32.
SPEFT_DEVICE uint64_t widened_counts(uint32_t counts) {
    return uint64_t(counts & 0xffff) | uint64_t(counts >> 16) << 32;
}

struct Work {
    TopkSizes sizes;
    Score score;
    const Matrix* matrices;
    const Segment* segments;
    State* states;
    uint32_t* histograms;  // [segments, kListWords]
    uint32_t* keys;        // [room]
    uint16_t* places;      // [room], in their tile
    int64_t* run_start;    // [tiles]
    uint32_t* run_length;  // [tiles]
    uint32_t* kept;        // [tiles]: counts
    uint64_t* groups;      // [groups]: their sums
    uint64_t* supers;      // [supers]
    uint32_t* pending;     // [1 + segments]: how many go over their data, and which
    int64_t* indices;
    uint64_t* told;  // [1 + matrices]: the first bad matrix or all ones; indices of each matrix
};

// A warp's lanes come together.
SPEFT_DEVICE int matrix_of_tile(const Work& work, int64_t tile) {
    return matrix_with_for_warp(work.matrices, int(work.sizes.matrices), &Matrix::first_tile, tile);
}

SPEFT_DEVICE int segment_of(const Work& work, int matrix) {
    return work.sizes.together ? 0 : matrix;
}

// Whether what reaches the bound has the k-th key, and was set aside.
SPEFT_DEVICE bool is_listed(const Segment& segment, uint64_t found) {
    return uint64_t(segment.k) <= found && found <= uint64_t(segment.capacity);
}

// Whether this block is the last of `blocks` of its segment to come here; it then sees what all
// have written.
SPEFT_DEVICE bool is_last(uint32_t& arrived, uint64_t blocks, uint64_t* told) {
    sync_block();  // the block's part is written
    if (threadIdx.x == 0) {
        // One thread's fences do for its block: barriers hand on what they order.
        fence();
        *told = atomic_add(&arrived, 1u) + 1;
        fence();
    }
    sync_block();  // all know whether theirs was the last
    return *told == blocks;
}

}  // namespace cuda
}  // namespace speft
