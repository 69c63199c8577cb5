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
    int64_t sample_rank;  // of the bound, among the samples
    int64_t capacity;     // entries that may be set aside
    int64_t list;         // the first one's place
    int64_t out;          // the first index's place
};

// What the device finds out about a segment.
struct State {
    uint64_t found;      // entries at or above the bound
    uint64_t rank;       // of the k-th key among those that share the digits known; then: ties kept
    uint32_t threshold;  // the digits known of the k-th largest key, then zeros; then: that key
    uint32_t bound;
    uint32_t arrived;  // blocks that have added their histogram
};

struct Work {
    TopkSizes sizes;
    Score score;
    const Matrix* matrices;
    const Segment* segments;
    State* states;
    uint64_t* histograms;  // [segments, kLevels, kBins]
    uint32_t* keys;        // [room]
    uint16_t* places;      // [room], in their tile
    int64_t* run_start;    // [tiles]
    uint32_t* run_length;  // [tiles]
    int64_t* kept;         // [2 tiles + 1]: above the k-th key, equal to it; then the sums before
    int64_t* indices;
    uint64_t* told;  // [1 + matrices]: the first bad matrix or all ones; indices of each matrix
};

SPEFT_DEVICE int matrix_of_tile(const Work& work, int64_t tile) {
    return matrix_with(work.matrices, int(work.sizes.matrices), &Matrix::first_tile, tile);
}

SPEFT_DEVICE int segment_of(const Work& work, int matrix) {
    return work.sizes.together ? 0 : matrix;
}

SPEFT_DEVICE bool is_listed(const Segment& segment, const State& state) {
    return uint64_t(segment.k) <= state.found && state.found <= uint64_t(segment.capacity);
}

}  // namespace cuda
}  // namespace speft
