// x @ (W + D)^T and its twin for many tokens: sparse_delta_matmul.cu says how.
#pragma once

#include <algorithm>

#include "bring.h"
#include "delta_tiles.h"

namespace speft {
namespace cuda {

constexpr int kThreads = 8 * kWarp;
constexpr int kTall = 256, kShort = 128;  // tokens of a tile
constexpr int kOutputs = 128;
constexpr int kWarpTokens = 64;  // of a warp's part of a tile
using LeftLayout = Swizzled<kSide>;
constexpr int kOutPitch = kOutputs + 8;  // of y's tile: puts what is stored at once in all banks
constexpr int kGroup = 8;  // tiles of tokens that share a tile of W while it is in the L2 cache
constexpr int kAcrossTiles = kOutputs / kSide;    // of D in one of W
constexpr int kAdding = kThreads / kAcrossTiles;  // threads that add the entries of one
static_assert(kAdding % kWarp == 0, "whole warps add the entries of a tile of D");

template <Base kBase, bool kTwin, int kTokens>
struct Tiles {
    using Element = typename Stored<kBase>::Element;
    // Of a warp. 64 x 64 ask 4 KB of shared memory for 65536 products, which 128 bytes a cycle can
    // feed. 64 x 32 ask half as much again, for which a short tile has two warps a scheduler.
    static constexpr int kWarpOutputs = kOutputs * kTokens / kWarpTokens / (kThreads / kWarp);
    // Turns of short tiles are shorter, and what comes from memory takes as long: for them as many
    // as take no more shared memory than a tall tile's.
    static constexpr int kStages = kTokens == kTall ? 4 : 6;
    // A tile of W has its rows as W has them: outputs, or for the twin what is summed over.
    static constexpr int kRows = kTwin ? kSide : kOutputs;
    static constexpr int kCols = kTwin ? kOutputs : kSide;
    using Layout = Swizzled<kCols>;
    // Whether W comes as the tensor cores read it; else a tile of its own is made of it.
    static constexpr bool kDirect = kBase == Base::kPlain;
    using StoredLayout = std::conditional_t<kDirect, Layout, Plain<kCols>>;
    static constexpr size_t kLeftBytes = size_t(kTokens) * kSide * 2;
    static constexpr size_t kStoredBytes =
        kBase == Base::kNone ? 0 : size_t(kRows) * kCols * sizeof(Element);
    static constexpr size_t kStageBytes = kLeftBytes + kStoredBytes;
    static constexpr size_t kTileBytes = size_t(kRows) * kCols * 2;
    static constexpr size_t kBytes = std::max(
        kStages * kStageBytes + (kDirect ? 0 : 2 * kTileBytes), size_t(kTokens) * kOutPitch * 2);
};

template <class T, Base kBase, bool kTwin, int kTokens>
SPEFT_KERNEL(kThreads, 1)
multiply_many(DeltaProduct product, bool x_vectors, bool weight_vectors, bool y_vectors) {
    using Tile = Tiles<kBase, kTwin, kTokens>;
    using Element = typename Stored<kBase>::Element;
    constexpr int kParts = Stored<kBase>::kParts, kStages = Tile::kStages;
    constexpr int kWarpOutputs = Tile::kWarpOutputs, kWarpsAcross = kOutputs / kWarpOutputs;

    // Which tile of y: kGroup tiles of tokens, then the next outputs.
    const int64_t down = parts_of(product.tokens, kTokens);
    const int64_t in_part = parts_of(part_width<kBase>(product), kOutputs);
    const int64_t across = kTwin ? kParts * in_part : parts_of(product.rows, kOutputs);
    const int64_t group = blockIdx.x / (kGroup * across) * kGroup;
    const int64_t members = smaller(kGroup, down - group);
    const int64_t within = blockIdx.x % (kGroup * across);
    const int64_t token = (group + within % members) * kTokens, output = within / members;

    const int64_t row = output * kOutputs;
    const Span outputs = span_of<kBase, kOutputs>(product, output % in_part, int(output / in_part));
    const int64_t first = kTwin ? outputs.column : row;
    const int count = kTwin ? outputs.count : int(smaller(kOutputs, product.rows - row));
    const int turns = int(kTwin ? parts_of(product.rows, kSide)
                                : kParts * parts_of(part_width<kBase>(product), kSide));
    // The columns of W that a turn sums over. The parts of the same words follow each other.
    const auto summed = [&](int turn) {
        return span_of<kBase, kSide>(product, unsigned(turn) / kParts,
                                     int(unsigned(turn) % kParts));
    };

    auto* const shared = shared_memory<unsigned char>();
    const auto left_of = [&](int turn) {
        return reinterpret_cast<uint16_t*>(shared + unsigned(turn) % kStages * Tile::kStageBytes);
    };
    const auto stored_of = [&](int turn) {
        const unsigned stage = unsigned(turn) / (kTwin ? 1 : kParts) % kStages;
        return reinterpret_cast<Element*>(shared + stage * Tile::kStageBytes + Tile::kLeftBytes);
    };
    const auto tile_of = [&](int turn) {
        unsigned char* const made = shared + kStages * Tile::kStageBytes;
        return Tile::kDirect
                   ? reinterpret_cast<uint16_t*>(stored_of(turn))
                   : reinterpret_cast<uint16_t*>(made + unsigned(turn) % 2 * Tile::kTileBytes);
    };

    const int tokens = int(smaller(kTokens, product.tokens - token));
    const auto* const x = static_cast<const uint16_t*>(product.x) + token * product.x_stride;
    const auto* weight = static_cast<const Element*>(product.weight);
    if (kBase != Base::kNone) weight += kTwin ? outputs.stored : row * product.weight_stride;
    const Chunks<kTokens, LeftLayout, kThreads, uint16_t> of_x(product.x_stride, tokens, kSide);
    const Chunks<Tile::kRows, typename Tile::StoredLayout, kThreads, Element> of_weight(
        product.weight_stride, kTwin ? kSide : count, kTwin ? count : kSide);
    const auto fetch_x = [&](int turn, const Span& span, int64_t depth) {
        const uint16_t* const from = x + (kTwin ? depth : span.column);
        const int real = kTwin ? int(smaller(kSide, product.rows - depth)) : span.count;
        if (x_vectors)
            of_x.bring_columns(left_of(turn), from, real);
        else
            bring_singly<kTokens, LeftLayout, kThreads>(left_of(turn), from, product.x_stride,
                                                        tokens, real);
    };
    const auto fetch_weight = [&](int turn, const Span& span, int64_t depth) {
        const Element* const from = weight + (kTwin ? depth * product.weight_stride : span.stored);
        const int64_t left = product.rows - depth;
        if (!weight_vectors)
            bring_singly<Tile::kRows, typename Tile::StoredLayout, kThreads>(
                stored_of(turn), from, product.weight_stride, kTwin ? left : count,
                kTwin ? count : span.count);
        else if (kTwin)
            of_weight.bring_rows(stored_of(turn), from, left);
        else
            of_weight.bring_columns(stored_of(turn), from, span.count);
    };
    const auto fetch = [&](int turn) {
        if (turn < turns) {
            const Span span = summed(turn);
            const int64_t depth = int64_t(turn) * kSide;
            fetch_x(turn, span, depth);
            if (kBase != Base::kNone && (kTwin || unsigned(turn) % kParts == 0))
                fetch_weight(turn, span, depth);
        }
        cp_async_commit();  // also an empty group: the waits below count groups
    };

    // What a thread makes of a quantized tile: eight columns of rows that are kApart apart, each
    // with a scale that was loaded a turn before it is needed.
    constexpr int kChunks = Tile::kCols / kChunk, kApart = kThreads / kChunks;
    constexpr int kMade = Tile::kRows / kApart;
    static_assert(kMade * kApart == Tile::kRows, "each thread makes as many");
    const int made_row = int(threadIdx.x) / kChunks,
              made_column = int(threadIdx.x) % kChunks * kChunk;
    uint32_t scales[kMade] = {};  // their bits
    const auto load_scales = [&](int turn) {
        if (!Stored<kBase>::kQuantized || turn >= turns) return;
        const Span span = kTwin ? outputs : summed(turn);
        const int64_t above = (kTwin ? int64_t(turn) * kSide : row) + made_row;
        const int group = group_of(product, span.column + made_column);
        by_scales<kBase>(product, [&](const auto* all) {
            const auto* const from = all + above * product.groups + group;
            SPEFT_UNROLL
            for (int i = 0; i < kMade; ++i) {
                const bool real = above + i * kApart < product.rows && made_column < span.count;
                scales[i] = real ? from[i * kApart * product.groups] : 0u;
            }
        });
    };

    // Makes a turn's tile of what is stored of it.
    const auto widen_tile = [&](int turn) {
        const int part = int(kTwin ? output / in_part : unsigned(turn) % kParts);
        by_scales<kBase>(product, [&](const auto* all) {
            using Scale = std::decay_t<decltype(*all)>;
            SPEFT_UNROLL
            for (int i = 0; i < kMade; ++i) {
                const int r = made_row + i * kApart, c = made_column;
                Some<uint16_t> numbers = {};
                if constexpr (Stored<kBase>::kQuantized) {
                    const auto stored =
                        load<kChunk>(stored_of(turn) + Tile::StoredLayout::at(r, c), true);
                    SPEFT_UNROLL
                    for (int w = 0; w < kChunk / 2; ++w)
                        numbers.words[w] = number_pair<T, kBase, Scale>(stored, w, part, scales[i]);
                }
                *reinterpret_cast<Bytes16*>(tile_of(turn) + Tile::Layout::at(r, c)) =
                    bit_cast<Bytes16>(numbers);
            }
        });
    };

    // The warps part the tiles of D beside each other among them, and the entries of each.
    const int lane = lane_id(), quarter = warp_id() % kAcrossTiles;
    const int adder = warp_id() / kAcrossTiles * kWarp + lane;
    const auto my_run = [&](int turn) -> Run {
        if (turn >= turns) return {0, 0};
        const int64_t row_tile = kTwin ? turn : row / kSide + quarter;
        const int64_t column_tile = kTwin ? outputs.tile + quarter : summed(turn).tile;
        const bool there = kTwin ? quarter < outputs.tiles : row_tile * kSide < product.rows;
        if (!there) return {0, 0};
        const Run run = run_of<kBase>(product, row_tile, column_tile);
        return {run.begin + adder, run.end};
    };
    const auto add_entry = [&](uint16_t* tile, Entry entry) {
        const int r = int(entry.place / kSide) + (kTwin ? 0 : quarter * kSide);
        const int c = int(entry.place % kSide) + (kTwin ? quarter * kSide : 0);
        uint16_t& place = tile[Tile::Layout::at(r, c)];
        T weight_there;
        weight_there.bits = place;
        place = narrow<T>(widen(weight_there) + entry.value).bits;
    };

    constexpr int kDown = kWarpTokens / 16, kAcross = kWarpOutputs / 8;
    const int warp_token = warp_id() / kWarpsAcross * kWarpTokens,
              warp_output = warp_id() % kWarpsAcross * kWarpOutputs;
    // Warps without a token multiply nothing: of 64 tokens of a short tile each scheduler has one
    // that does.
    const int first_turn = warp_token < tokens ? 0 : turns;
    float sums[kDown][kAcross][4] = {};

    // What a warp multiplies at once, in registers. Lane l brings row l % 8 of the 8 x 8 matrix
    // l / 8. Of x, matrices follow each other down the tokens first; of W, down what is summed
    // over.
    struct Half {
        uint32_t rows_of_x[kDown][4], of_weight[kAcross / 2][4];
    };
    const auto load_half = [&](Half& half, int turn, int depth) {
        const uint16_t* const left = left_of(turn);
        const uint16_t* const right = tile_of(turn);
        const int of_x_row = warp_token + lane % 16, of_x_column = depth + lane / 16 * 8;
        SPEFT_UNROLL
        for (int i = 0; i < kDown; ++i)
            ldmatrix_x4(half.rows_of_x[i],
                        left + LeftLayout::at(of_x_row, of_x_column) + i * 16 * kSide);
        SPEFT_UNROLL
        for (int j = 0; j < kAcross / 2; ++j) {
            if (kTwin)
                ldmatrix_x4_trans(half.of_weight[j],
                                  right + Tile::Layout::at(depth + lane % 16,
                                                           warp_output + lane / 16 * 8 + j * 16));
            else
                ldmatrix_x4(half.of_weight[j],
                            right +
                                Tile::Layout::at(warp_output + lane % 8 + lane / 16 * 8,
                                                 depth + lane / 8 % 2 * 8) +
                                j * 16 * kSide);
        }
    };
    const auto multiply = [&](const Half& half) {
        SPEFT_UNROLL
        for (int j = 0; j < kAcross; ++j) {
            const uint32_t* const of_weight = half.of_weight[j / 2] + j % 2 * 2;
            const uint32_t columns[2] = {of_weight[0], of_weight[1]};
            SPEFT_UNROLL
            for (int i = 0; i < kDown; ++i)
                mma_m16n8k16<T>(sums[i][j], half.rows_of_x[i], columns);
        }
    };

    load_scales(0);
    Run next = my_run(0), after = my_run(1);
    Entry entry = entry_of(product, next.begin, next.end);
    SPEFT_UNROLL
    for (int turn = 0; turn < kStages - 2; ++turn)
        fetch(turn);
    Half later;
    for (int turn = -1; turn < turns; ++turn) {
        cp_async_wait<kStages - 3>();
        sync_block();  // the next turn's tiles have arrived, this one's has its entries, and what
                       // the one before has read is free
        const auto prepare = [&] {
            if (turn + 1 < turns) {
                if (!Tile::kDirect) {
                    widen_tile(turn + 1);
                    load_scales(turn + 2);
                    sync_block();  // the tile is whole
                }
                if (next.begin < next.end) add_entry(tile_of(turn + 1), entry);
                for (int at = next.begin + kAdding; at < next.end; at += kAdding)
                    add_entry(tile_of(turn + 1), entry_of(product, at, next.end));
                next = after;
                entry = entry_of(product, next.begin, next.end);
                after = my_run(turn + 3);
            }
            fetch(turn + kStages - 1);
        };
        // One block has a multiprocessor to itself, and nothing but its own products keeps the
        // tensor cores busy. So after the barrier those come whose operands were loaded before it,
        // and between two barriers half of a turn's come first.
        if (turn > first_turn) multiply(later);
        if (turn >= first_turn) {
            Half now;
            load_half(now, turn, 0);
            multiply(now);
        }
        prepare();
        if (turn >= first_turn) load_half(later, turn, kProduct);
    }
    if (turns > first_turn) multiply(later);

    // Through shared memory, so that rows leave 16 bytes at a time.
    sync_block();
    auto* const rounded = reinterpret_cast<uint16_t*>(shared);
    const auto* const bias = static_cast<const T*>(product.bias);
    SPEFT_UNROLL
    for (int j = 0; j < kAcross; ++j) {
        const int c = warp_output + j * 8 + lane % 4 * 2;
        const float low = bias && c < count ? widen(bias[first + c]) : 0.0f;
        const float high = bias && c + 1 < count ? widen(bias[first + c + 1]) : 0.0f;
        SPEFT_UNROLL
        for (int i = 0; i < kDown; ++i)
            SPEFT_UNROLL
        for (int v = 0; v < 2; ++v) {
            const int r = warp_token + i * 16 + lane / 4 + v * 8;
            *reinterpret_cast<uint32_t*>(rounded + r * kOutPitch + c) =
                pair_of(narrow<T>(sums[i][j][2 * v] + low).bits,
                        narrow<T>(sums[i][j][2 * v + 1] + high).bits);
        }
    }
    sync_block();
    const int64_t width = kTwin ? product.cols : product.rows;
    auto* const y = static_cast<uint16_t*>(product.y) + token * width + first;
    if (y_vectors) {
        constexpr int kChunks = kOutputs / kChunk;
        for (int i = int(threadIdx.x); i < tokens * kChunks; i += kThreads) {
            const int r = i / kChunks, c = i % kChunks * kChunk;
            if (c < count)
                *reinterpret_cast<Bytes16*>(y + r * width + c) =
                    *reinterpret_cast<const Bytes16*>(rounded + r * kOutPitch + c);
        }
    } else {
        for (int i = int(threadIdx.x); i < tokens * kOutputs; i += kThreads) {
            const int r = i / kOutputs, c = i % kOutputs;
            if (c < count) y[r * width + c] = rounded[r * kOutPitch + c];
        }
    }
}

}  // namespace cuda
}  // namespace speft
