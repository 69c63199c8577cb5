// sparse_delta_matmul: x @ (W + D)^T + b and its twin x @ (W + D), where W + D exists in no device
// memory; for 16-bit x over a W of 16, 8 or 4 bits, on the tensor cores.
//
// Many tokens, `multiply_many`: a product of tiles of 128 tokens, 128 outputs and 32 of what is
// summed over, which come to shared memory through four asynchronous stages. Before the tensor
// cores read a tile of W, it gets its entries of D there, rounded to W's dtype as a weight that
// holds D would be; a quantized W is first widened into a second tile. D comes sorted by tiles of
// 32 x 32, which serve both products. The entries of a tile are added while the tensor cores work
// on the one before, one barrier a tile, and were loaded a tile earlier.
//
// Few tokens, `multiply_few`: bound by reading W once. A warp takes 32 of what is summed over and
// 32 outputs (64 in the twin) straight into registers: the order of what is summed over is free, so
// that 16 neighbouring bytes of a lane are fragments of a product. Nothing waits for a barrier
// until the warps' sums are added, in order. Entries are added to the sums in float32, and D's bits
// that W's dtype lacks count.
//
// Count (M tokens, N x K, E entries, q bytes of W an element). Many: 2 M N K operations on the
// tensor cores; from the L2 cache (2 M K / 128 N) + (q N K / 128 M) bytes in tiles, and 6 E / 128 M
// for the entries: 2.3 % of W's part at 0.5 %. In shared memory a tile is written once and read
// twice; its entries read and write 2 bytes each. Few: q N K bytes,
// 6 E, and 2 M K from the L2 cache once for each 32 outputs; 30 instructions of a warp an entry for
// 16 tokens, at 0.5 % about as many as the rest: 150 and 60 in the time that 2 KB of W take.
#include <algorithm>

#include "base.h"
#include "bring.h"
#include "device.h"
#include "kernels.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kSide = 32;     // of a tile of D, and what is summed over at a time
constexpr int kProduct = 16;  // what one product of the tensor cores sums over

SPEFT_BOTH int64_t parts_of(int64_t whole, int64_t size) {
    return (whole + size - 1) / size;
}

SPEFT_DEVICE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

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
    int place;
    float value;
};

SPEFT_DEVICE Entry entry_of(const DeltaProduct& product, int at, int end) {
    if (at >= end) return {0, 0.0f};
    return {product.places[at], product.values[at]};
}

// Many tokens ---------------------------------------------------------------------------------

constexpr int kThreads = 4 * kWarp;
constexpr int kTokens = 128;
constexpr int kOutputs = 128;
// Of a warp: 4 KB from shared memory for 65536 products, which 128 bytes a cycle can feed; 64 x 32
// would take half as much again.
constexpr int kWarpTokens = 64;
constexpr int kWarpOutputs = 64;
constexpr int kStages = 4;
// 16 bytes beside each row put the eight rows that ldmatrix reads at once into different banks.
constexpr int kPad = 8;
constexpr int kLeftPitch = kSide + kPad;
constexpr int kGroup = 8;  // tiles of tokens that share a tile of W while it is in the L2 cache
static_assert(kThreads / kWarp == kOutputs / kSide, "a warp for each tile of D in one of W");

template <Base kBase, bool kTwin>
struct Tiles {
    using Element = typename Stored<kBase>::Element;
    // A tile of W has its rows as W has them: outputs, or for the twin what is summed over.
    static constexpr int kRows = kTwin ? kSide : kOutputs;
    static constexpr int kCols = kTwin ? kOutputs : kSide;
    static constexpr int kPitch = kCols + kPad;
    // Whether W comes as the tensor cores read it; else a tile of its own is made of it.
    static constexpr bool kDirect = kBase == Base::kPlain;
    static constexpr int kStoredPitch = kDirect ? kPitch : kCols;
    static constexpr size_t kLeftBytes = size_t(kTokens) * kLeftPitch * 2;
    static constexpr size_t kStoredBytes =
        kBase == Base::kNone ? 0 : size_t(kRows) * kStoredPitch * sizeof(Element);
    static constexpr size_t kStageBytes = kLeftBytes + kStoredBytes;
    static constexpr size_t kTileBytes = size_t(kRows) * kPitch * 2;
    static constexpr size_t kBytes =
        std::max(kStages * kStageBytes + (kDirect ? 0 : 2 * kTileBytes),
                 size_t(kTokens) * (kOutputs + kPad) * 2);
};

template <class T, Base kBase, bool kTwin>
SPEFT_KERNEL(kThreads, 2)
multiply_many(DeltaProduct product, bool x_vectors, bool weight_vectors, bool y_vectors) {
    using Tile = Tiles<kBase, kTwin>;
    using Element = typename Stored<kBase>::Element;
    constexpr int kParts = Stored<kBase>::kParts;

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
        return span_of<kBase, kSide>(product, turn / kParts, turn % kParts);
    };

    auto* const shared = shared_memory<unsigned char>();
    const auto left_of = [&](int turn) {
        return reinterpret_cast<uint16_t*>(shared + turn % kStages * Tile::kStageBytes);
    };
    const auto stored_of = [&](int turn) {
        const int stage = (kTwin ? turn : turn / kParts) % kStages;
        return reinterpret_cast<Element*>(shared + stage * Tile::kStageBytes + Tile::kLeftBytes);
    };
    const auto tile_of = [&](int turn) {
        unsigned char* const made = shared + kStages * Tile::kStageBytes;
        return Tile::kDirect ? reinterpret_cast<uint16_t*>(stored_of(turn))
                             : reinterpret_cast<uint16_t*>(made + turn % 2 * Tile::kTileBytes);
    };

    const auto* const x = static_cast<const uint16_t*>(product.x);
    const auto* const weight = static_cast<const Element*>(product.weight);
    const auto fetch = [&](int turn) {
        if (turn < turns) {
            const Span span = summed(turn);
            const int64_t depth = int64_t(turn) * kSide;
            const Columns<uint16_t> of_x = {
                x + (kTwin ? depth : span.column), product.x_stride,
                kTwin ? int(smaller(kSide, product.rows - depth)) : span.count, x_vectors};
            bring<kTokens, kSide, kLeftPitch, kThreads, 1>(left_of(turn), of_x, token,
                                                           product.tokens);
            if (kBase != Base::kNone && (kTwin || turn % kParts == 0)) {
                const Columns<Element> of_weight = {
                    weight + (kTwin ? outputs.stored : span.stored), product.weight_stride,
                    kTwin ? outputs.count : span.count, weight_vectors};
                bring<Tile::kRows, Tile::kCols, Tile::kStoredPitch, kThreads, 1>(
                    stored_of(turn), of_weight, kTwin ? depth : row, product.rows);
            }
        }
        cp_async_commit();  // also an empty group: the waits below count groups
    };

    // Makes a turn's tile of what is stored of it.
    const auto widen_tile = [&](int turn) {
        constexpr int kChunks = Tile::kCols / kChunk;
        const Span span = kTwin ? outputs : summed(turn);
        const int64_t above = kTwin ? int64_t(turn) * kSide : row;
        const int part = int(kTwin ? output / in_part : turn % kParts);
        // The sums leave no registers for several at a time.
        SPEFT_UNROLL_BY(1)
        for (int i = int(threadIdx.x); i < Tile::kRows * kChunks; i += kThreads) {
            const int r = i / kChunks, c = i % kChunks * kChunk;
            Some<uint16_t> numbers = {};
            if constexpr (Stored<kBase>::kQuantized) {
                const bool real = above + r < product.rows && c < span.count;
                const float scale = real ? scale_at<T>(product, above + r, span.column + c) : 0.0f;
                const auto stored =
                    load<kChunk>(stored_of(turn) + r * Tile::kStoredPitch + c, true);
                numbers = widened<T, kBase>(stored, part, scale);
            }
            Bytes16 bytes;
            SPEFT_UNROLL
            for (int w = 0; w < 4; ++w)
                bytes.words[w] = pair_of(numbers.elements[2 * w], numbers.elements[2 * w + 1]);
            *reinterpret_cast<Bytes16*>(tile_of(turn) + r * Tile::kPitch + c) = bytes;
        }
    };

    // Each warp adds the entries of one tile of D, of the four beside each other.
    const int lane = lane_id(), quarter = warp_id();
    const auto my_run = [&](int turn) -> Run {
        if (turn >= turns) return {0, 0};
        const int64_t row_tile = kTwin ? turn : row / kSide + quarter;
        const int64_t column_tile = kTwin ? outputs.tile + quarter : summed(turn).tile;
        const bool there = kTwin ? quarter < outputs.tiles : row_tile * kSide < product.rows;
        if (!there) return {0, 0};
        const Run run = run_of<kBase>(product, row_tile, column_tile);
        return {run.begin + lane, run.end};
    };
    const auto add_entry = [&](uint16_t* tile, Entry entry) {
        const int r = entry.place / kSide + (kTwin ? 0 : quarter * kSide);
        const int c = entry.place % kSide + (kTwin ? quarter * kSide : 0);
        T weight_there;
        weight_there.bits = tile[r * Tile::kPitch + c];
        tile[r * Tile::kPitch + c] = narrow<T>(widen(weight_there) + entry.value).bits;
    };

    constexpr int kDown = kWarpTokens / 16, kAcross = kWarpOutputs / 8;
    const int warp_token = warp_id() % 2 * kWarpTokens, warp_output = warp_id() / 2 * kWarpOutputs;
    float sums[kDown][kAcross][4] = {};

    Run next = my_run(0), after = my_run(1);
    Entry entry = entry_of(product, next.begin, next.end);
    SPEFT_UNROLL
    for (int turn = 0; turn < kStages - 2; ++turn)
        fetch(turn);
    for (int turn = -1; turn < turns; ++turn) {
        cp_async_wait<kStages - 3>();
        sync_block();  // the next turn's tiles have arrived, this one's has its entries, and what
                       // the one before has read is free
        if (turn + 1 < turns) {
            if (!Tile::kDirect) {
                widen_tile(turn + 1);
                sync_block();  // the tile is whole
            }
            if (next.begin < next.end) add_entry(tile_of(turn + 1), entry);
            for (int at = next.begin + kWarp; at < next.end; at += kWarp)
                add_entry(tile_of(turn + 1), entry_of(product, at, next.end));
            next = after;
            entry = entry_of(product, next.begin, next.end);
            after = my_run(turn + 3);
        }
        fetch(turn + kStages - 1);
        if (turn < 0) continue;
        // Lane l brings row l % 8 of the 8 x 8 matrix l / 8. Of x, matrices follow each other down
        // the tokens first; of W, down what is summed over.
        const uint16_t* const left =
            left_of(turn) + (warp_token + lane % 16) * kLeftPitch + lane / 16 * 8;
        const uint16_t* const right =
            tile_of(turn) +
            (kTwin ? (lane % 16) * Tile::kPitch + warp_output + lane / 16 * 8
                   : (warp_output + lane % 8 + lane / 16 * 8) * Tile::kPitch + lane / 8 % 2 * 8);
        SPEFT_UNROLL
        for (int depth = 0; depth < kSide; depth += kProduct) {
            uint32_t rows_of_x[kDown][4];
            SPEFT_UNROLL
            for (int i = 0; i < kDown; ++i)
                ldmatrix_x4(rows_of_x[i], left + i * 16 * kLeftPitch + depth);
            SPEFT_UNROLL
            for (int j = 0; j < kAcross; j += 2) {
                uint32_t of_weight[4];
                if (kTwin)
                    ldmatrix_x4_trans(of_weight, right + depth * Tile::kPitch + j * 8);
                else
                    ldmatrix_x4(of_weight, right + j * 8 * Tile::kPitch + depth);
                const uint32_t one[2] = {of_weight[0], of_weight[1]};
                const uint32_t two[2] = {of_weight[2], of_weight[3]};
                SPEFT_UNROLL
                for (int i = 0; i < kDown; ++i) {
                    mma_m16n8k16<T>(sums[i][j], rows_of_x[i], one);
                    mma_m16n8k16<T>(sums[i][j + 1], rows_of_x[i], two);
                }
            }
        }
    }

    // Through shared memory, so that rows leave 16 bytes at a time.
    constexpr int kOutPitch = kOutputs + kPad;
    cp_async_wait<0>();
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
    const int tokens = int(smaller(kTokens, product.tokens - token));
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

// Few tokens ----------------------------------------------------------------------------------

constexpr int kWarps = 8;
constexpr int kRound = 16;  // tokens of a block
constexpr int kFewTokens = 2 * kRound;

// What one warp sums over in a turn, in registers. Lane 4 g + t has tokens g and g + 8. Of
// x @ W^T it has columns 8 t to 8 t + 7 of 32, and rows g + 8 j of W: 16 bytes are two steps of a
// product whose summands are taken in another order. Of the twin it has rows 4 t to 4 t + 3 of each
// 16 of W, and columns 8 g to 8 g + 7, one for each of eight products.
template <class T, Base kBase, bool kTwin>
struct Turn {
    using Element = typename Stored<kBase>::Element;
    static constexpr int kParts = Stored<kBase>::kParts;
    static constexpr int kLines = kTwin ? 8 : 4;  // rows of W
    static constexpr int kPieces = kTwin ? 2 : kParts;
    static constexpr int kPiece = kTwin ? 4 : kChunk;

    Some<Element> weight[kLines];
    Some<uint16_t, kPiece> x[kPieces][2];

    // Row `line` of W that this lane has of rows from `above`.
    SPEFT_DEVICE static int64_t row_of(int64_t above, int line) {
        const int group = lane_id() / 4, place = lane_id() % 4;
        return kTwin ? above + line / 4 * kProduct + place * 4 + line % 4
                     : above + group + line * 8;
    }
    SPEFT_DEVICE static int column_of() { return (kTwin ? lane_id() / 4 : lane_id() % 4) * kChunk; }

    // Rows from `above`, and the columns of a span.
    SPEFT_DEVICE void bring(const DeltaProduct& product, int64_t token, int64_t above,
                            const Span& span) {
        if constexpr (kBase != Base::kNone) {
            const auto* const from = static_cast<const Element*>(product.weight);
            SPEFT_UNROLL
            for (int i = 0; i < kLines; ++i) {
                const int64_t row = row_of(above, i), column = span.stored + column_of();
                const bool real = row < product.rows && column_of() < span.count;
                weight[i] = load<kChunk>(from + row * product.weight_stride + column, real);
            }
            SPEFT_UNROLL
            for (int i = 0; i < kPieces; ++i)
                SPEFT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t row = token + lane_id() / 4 + 8 * half;
                const int64_t first =
                    kTwin ? row_of(above, 4 * i)
                          : i * part_width<kBase>(product) + span.column + column_of();
                const bool real = kTwin ? first < product.rows : column_of() < span.count;
                const auto* const line =
                    static_cast<const uint16_t*>(product.x) + row * product.x_stride;
                x[i][half] = load<kPiece>(line + first, real && row < product.tokens);
            }
        }
    }

    // Row `line` of W as numbers of T, of one part of its words.
    SPEFT_DEVICE Some<uint16_t> numbers(const DeltaProduct& product, int line, int64_t above,
                                        int64_t column, int count, int part) const {
        if constexpr (Stored<kBase>::kQuantized) {
            const int64_t row = row_of(above, line);
            const bool real = row < product.rows && column_of() < count;
            const float scale = real ? scale_at<T>(product, row, column + column_of()) : 0.0f;
            return widened<T, kBase>(weight[line], part, scale);
        } else {
            return weight[line];
        }
    }

    // Four of a piece of x, from element `from` on, as the product takes them.
    SPEFT_DEVICE void rows_of_x(uint32_t (&rows)[4], int piece, int from) const {
        SPEFT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const auto& elements = x[piece][i % 2].elements;
            rows[i] = pair_of(elements[from + i / 2 * 2], elements[from + i / 2 * 2 + 1]);
        }
    }
};

// Adds the entries of a tile of D, that begins at column `first` of x and column `beside` of the
// warp's outputs, to its sums.
template <class T, bool kTwin, int kAcross>
SPEFT_DEVICE void add_entries(float (&sums)[kAcross][4], const DeltaProduct& product, Run run,
                              int64_t token, int64_t first, int beside) {
    const int group = lane_id() / 4, place = lane_id() % 4;
    const auto* const x = static_cast<const T*>(product.x) + first;
    const int64_t one = token + group, two = one + 8;
    for (int begin = run.begin; begin < run.end; begin += kWarp) {
        const Entry mine = entry_of(product, begin + lane_id(), run.end);
        const int count = run.end - begin < kWarp ? run.end - begin : kWarp;
        for (int e = 0; e < count; ++e) {
            const int at = exchange_from(mine.place, e);
            const float value = exchange_from(mine.value, e);
            const int from = kTwin ? at / kSide : at % kSide;
            const int to = beside + (kTwin ? at % kSide : at / kSide);
            // Which of the lanes, the products and their two columns holds output `to`.
            const int holder = kTwin ? to / 16 : to % 8 / 2;
            const int tile = kTwin ? to % 8 : to / 8;
            const int side = kTwin ? to / 8 % 2 : to % 2;
            if (holder != place) continue;
            const float x_one =
                one < product.tokens ? widen(x[one * product.x_stride + from]) : 0.0f;
            const float x_two =
                two < product.tokens ? widen(x[two * product.x_stride + from]) : 0.0f;
            SPEFT_UNROLL
            for (int j = 0; j < kAcross; ++j)
                SPEFT_UNROLL
            for (int s = 0; s < 2; ++s) {
                if (j == tile && s == side) {
                    sums[j][s] += x_one * value;
                    sums[j][2 + s] += x_two * value;
                }
            }
        }
    }
}

template <class T, Base kBase, bool kTwin>
SPEFT_KERNEL(kWarps* kWarp)
multiply_few(DeltaProduct product) {
    constexpr int kParts = Stored<kBase>::kParts;
    constexpr int kWide = kTwin ? 64 : 32, kAcross = kWide / 8;
    // Turns in registers: as many as there is room for beside what words are widened to.
    constexpr int kAhead = kBase == Base::kInt4 ? 1 : 2;
    using Part = Turn<T, kBase, kTwin>;

    const int64_t in_part = parts_of(part_width<kBase>(product), kWide);
    const Span outputs =
        span_of<kBase, kWide>(product, blockIdx.x % in_part, int(blockIdx.x / in_part));
    const int64_t row = int64_t(blockIdx.x) * kWide, token = int64_t(blockIdx.y) * kRound;
    const int64_t first = kTwin ? outputs.column : row;
    const int count = kTwin ? outputs.count : int(smaller(kWide, product.rows - row));
    const int turns =
        int(kTwin ? parts_of(product.rows, kSide) : parts_of(part_width<kBase>(product), kSide));
    const auto span_at = [&](int turn) {
        return kTwin ? outputs : span_of<kBase, kSide>(product, turn, 0);
    };
    const auto above_at = [&](int turn) { return kTwin ? int64_t(turn) * kSide : row; };

    float sums[kAcross][4] = {};
    Part ring[kAhead];
    const auto bring = [&](Part& to, int turn) {
        if (turn < turns) to.bring(product, token, above_at(turn), span_at(turn));
    };
    SPEFT_UNROLL
    for (int i = 0; i < kAhead; ++i)
        bring(ring[i], warp_id() + i * kWarps);
    for (int begin = warp_id(); begin < turns; begin += kAhead * kWarps) {
        SPEFT_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            const int turn = begin + i * kWarps;
            if (turn >= turns) break;
            const Span span = span_at(turn);
            const int64_t above = above_at(turn);
            if constexpr (kBase != Base::kNone && kTwin) {
                const int part = int(blockIdx.x / in_part);
                SPEFT_UNROLL
                for (int step = 0; step < 2; ++step) {
                    uint32_t rows[4];
                    ring[i].rows_of_x(rows, step, 0);
                    Some<uint16_t> lines[4];
                    SPEFT_UNROLL
                    for (int line = 0; line < 4; ++line)
                        lines[line] = ring[i].numbers(product, 4 * step + line, above, span.column,
                                                      span.count, part);
                    SPEFT_UNROLL
                    for (int j = 0; j < kAcross; ++j) {
                        const uint32_t columns[2] = {
                            pair_of(lines[0].elements[j], lines[1].elements[j]),
                            pair_of(lines[2].elements[j], lines[3].elements[j])};
                        mma_m16n8k16<T>(sums[j], rows, columns);
                    }
                }
            }
            if constexpr (kBase != Base::kNone && !kTwin) {
                SPEFT_UNROLL
                for (int part = 0; part < kParts; ++part)
                    SPEFT_UNROLL
                for (int j = 0; j < kAcross; ++j) {
                    const int64_t column = span.column + part * part_width<kBase>(product);
                    const auto line = ring[i].numbers(product, j, above, column, span.count, part);
                    SPEFT_UNROLL
                    for (int step = 0; step < 2; ++step) {
                        uint32_t rows[4];
                        ring[i].rows_of_x(rows, part, 4 * step);
                        const uint32_t columns[2] = {
                            pair_of(line.elements[4 * step], line.elements[4 * step + 1]),
                            pair_of(line.elements[4 * step + 2], line.elements[4 * step + 3])};
                        mma_m16n8k16<T>(sums[j], rows, columns);
                    }
                }
            }
            bring(ring[i], turn + kAhead * kWarps);
            if constexpr (kTwin) {
                for (int side = 0; side < int(smaller(2, outputs.tiles)); ++side)
                    add_entries<T, kTwin>(sums, product,
                                          run_of<kBase>(product, turn, outputs.tile + side), token,
                                          above, side * kSide);
            } else {
                for (int part = 0; part < kParts; ++part) {
                    const Span of_part = span_of<kBase, kSide>(product, turn, part);
                    add_entries<T, kTwin>(sums, product,
                                          run_of<kBase>(product, row / kSide, of_part.tile), token,
                                          of_part.column, 0);
                }
            }
        }
    }

    auto* const all = shared_memory<float>();
    SPEFT_UNROLL
    for (int j = 0; j < kAcross; ++j)
        SPEFT_UNROLL
    for (int v = 0; v < 4; ++v) {
        const int r = lane_id() / 4 + v / 2 * 8, pair = lane_id() % 4 * 2 + v % 2;
        const int c = kTwin ? pair * 8 + j : j * 8 + pair;
        all[(warp_id() * kRound + r) * kWide + c] = sums[j][v];
    }
    sync_block();  // the sums of all warps are there
    const int64_t width = kTwin ? product.cols : product.rows;
    const auto* const bias = static_cast<const T*>(product.bias);
    auto* const y = static_cast<T*>(product.y);
    for (int i = int(threadIdx.x); i < kRound * kWide; i += kWarps * kWarp) {
        const int64_t r = token + i / kWide;
        const int c = i % kWide;
        if (r >= product.tokens || c >= count) continue;
        float total = bias ? widen(bias[first + c]) : 0.0f;
        for (int warp = 0; warp < kWarps; ++warp)
            total += all[warp * kRound * kWide + i];
        y[r * width + first + c] = narrow<T>(total);
    }
}

template <class T, Base kBase, bool kTwin>
int multiply(const DeltaProduct& product, Place place) {
    using Element = typename Stored<kBase>::Element;
    const int64_t width = product.cols / Stored<kBase>::kParts;
    const bool x_vectors =
        in_vectors<uint16_t>(product.x, product.x_stride, kTwin ? product.rows : width);
    const bool weight_vectors = in_vectors<Element>(product.weight, product.weight_stride, width);
    const bool few =
        product.tokens <= kFewTokens && (kBase == Base::kNone || (x_vectors && weight_vectors));
    const int64_t outputs = few ? (kTwin ? 64 : 32) : kOutputs;
    const int64_t across =
        kTwin ? Stored<kBase>::kParts * parts_of(width, outputs) : parts_of(product.rows, outputs);
    const int64_t tiles = few ? across : across * parts_of(product.tokens, kTokens);
    const int64_t turns = kTwin ? parts_of(product.rows, kSide) : parts_of(product.cols, kSide);
    if (tiles > INT32_MAX || turns > INT32_MAX / 4) return kUnsupported;
    if (few) {
        const dim3 grid(unsigned(tiles), unsigned(parts_of(product.tokens, kRound)));
        const size_t shared_bytes = size_t(kWarps) * kRound * outputs * sizeof(float);
        return launch(multiply_few<T, kBase, kTwin>, grid, kWarps * kWarp, shared_bytes,
                      place.stream, product);
    }
    const int64_t y_width = kTwin ? product.cols : product.rows;
    return launch(multiply_many<T, kBase, kTwin>, dim3(unsigned(tiles)), kThreads,
                  Tiles<kBase, kTwin>::kBytes, place.stream, product, x_vectors, weight_vectors,
                  in_vectors<uint16_t>(product.y, y_width, kTwin ? width : y_width));
}

template <class T, Base kBase>
int multiply_either(const DeltaProduct& product, bool twin, Place place) {
    return twin ? multiply<T, kBase, true>(product, place)
                : multiply<T, kBase, false>(product, place);
}

template <class T>
int multiply_any(const DeltaProduct& product, Base base, bool twin, Place place) {
    switch (base) {
        case Base::kNone:
            return multiply_either<T, Base::kNone>(product, twin, place);
        case Base::kPlain:
            return multiply_either<T, Base::kPlain>(product, twin, place);
        case Base::kInt8:
            return multiply_either<T, Base::kInt8>(product, twin, place);
        case Base::kInt4:
            return multiply_either<T, Base::kInt4>(product, twin, place);
    }
    return kUnsupported;
}

}  // namespace

int sparse_delta_matmul(const DeltaProduct& product, Base base, bool twin, DType dtype,
                        Place place) {
    const DeviceGuard guard(place.device);
    if (guard.error() != 0) return guard.error();
    if (product.tokens == 0) return 0;
    if (dtype == DType::kBFloat16) return multiply_any<BFloat16>(product, base, twin, place);
    if (dtype == DType::kFloat16) return multiply_any<Float16>(product, base, twin, place);
    return kUnsupported;
}

}  // namespace cuda
}  // namespace speft
