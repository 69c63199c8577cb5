// W's columns in spans, and D by tiles of 32 x 32: what both products of sparse_delta_matmul.cu
// read.
#pragma once

#include "base.h"

namespace speft {
namespace cuda {

constexpr int kSide = 32;     // of a tile of D, and what is summed over at a time
constexpr int kProduct = 16;  // what one product of the tensor cores sums over

// Some neighbouring columns of W within one part of them.
struct Span {
    int64_t column;  // the first
    int64_t stored;  // where it lies in a row, in elements as stored
    int count;       // that are real
    int64_t tile;    // of D, in a row of tiles
    int64_t tiles;   // of D to the end of the part
};

template <Base kBase>
SPEFT_DEVICE int64_t part_width(const DeltaProduct& product) {
    return product.cols / Stored<kBase>::kParts;
}

template <Base kBase>
SPEFT_DEVICE int64_t tiles_across(const DeltaProduct& product) {
    return parts_of(part_width<kBase>(product), kSide);
}

template <Base kBase, int kWidth>
SPEFT_DEVICE Span span_of(const DeltaProduct& product, int64_t index, int part) {
    const int64_t width = part_width<kBase>(product), start = index * kWidth;
    const int64_t tiles = tiles_across<kBase>(product);
    return {part * width + start, start, int(smaller(kWidth, width - start)),
            part * tiles + start / kSide, tiles - start / kSide};
}

// Where the entries of one tile of D stand.
struct Run {
    int begin, end;
};

template <Base kBase>
SPEFT_DEVICE Run run_of(const DeltaProduct& product, int64_t row_tile, int64_t column_tile) {
    const int64_t across = Stored<kBase>::kParts * tiles_across<kBase>(product);
    const int32_t* const start = product.starts + row_tile * across + column_tile;
    return {start[0], start[1]};
}

// An entry of a tile: its row * kSide + its column, and its value.
struct Entry {
    unsigned place;
    float value;
};

SPEFT_DEVICE Entry entry_of(const DeltaProduct& product, int at, int end) {
    if (at >= end) return {0u, 0.0f};
    return {product.places[at], product.values[product.order ? product.order[at] : at]};
}

}  // namespace cuda
}  // namespace speft
