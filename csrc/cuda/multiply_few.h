// x @ (W + D)^T and its twin for few tokens: sparse_delta_matmul.cu says how.
#pragma once

#include "delta_tiles.h"

namespace speft {
namespace cuda {

constexpr int kWarps = 8;
constexpr int kRound = 16;  // tokens of a block
static_assert(kFewTokens == 2 * kRound, "a block or two down");
template <bool kTwin>
constexpr int kFewOutputs = kTwin ? 64 : 32;  // of a block

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

    // Of each line and part of the words. Asked for as early as the line, for they come as late.
    static constexpr int kScaledParts = kTwin ? 1 : kParts;

    Some<Element> weight[kLines];
    uint32_t scales[kScaledParts][kLines];  // their bits
    Some<uint16_t, kPiece> x[kPieces][2];

    // The first row of W that this lane has, and how far below it is row `line`.
    SPEFT_DEVICE static int row_of() { return kTwin ? lane_id() % 4 * 4 : lane_id() / 4; }
    SPEFT_DEVICE static int below(int line) {
        return kTwin ? line / 4 * kProduct + line % 4 : line * 8;
    }
    SPEFT_DEVICE static int column_of() { return (kTwin ? lane_id() / 4 : lane_id() % 4) * kChunk; }

    // Rows from `above`, and the columns of a span. What is there is counted once, in 32 bits.
    SPEFT_DEVICE void bring(const DeltaProduct& product, int64_t token, int64_t above,
                            const Span& span) {
        if constexpr (kBase != Base::kNone) {
            const int64_t row = above + row_of();
            const int rows = int(smaller(kSide, product.rows - row));
            const bool across = column_of() < span.count;
            const auto* const from = static_cast<const Element*>(product.weight) +
                                     row * product.weight_stride + span.stored + column_of();
            SPEFT_UNROLL
            for (int i = 0; i < kLines; ++i)
                weight[i] = load<kChunk>(from + below(i) * product.weight_stride,
                                         across && below(i) < rows);
            if constexpr (Stored<kBase>::kQuantized)
                by_scales<kBase>(product, [&](const auto* all) {
                    // The address is made once, and what is added to it has 32 bits: left to the
                    // compiler, each scale takes ten instructions.
                    const auto* const of_row = afresh(all + row * product.groups);
                    SPEFT_UNROLL
                    for (int part = 0; part < kScaledParts; ++part) {
                        const int64_t first = span.column + part * part_width<kBase>(product);
                        const uint32_t group = group_of(product, first + column_of());
                        SPEFT_UNROLL
                        for (int i = 0; i < kLines; ++i) {
                            const bool real = across && below(i) < rows;
                            const uint32_t at = below(i) * uint32_t(product.groups) + group;
                            scales[part][i] = real ? read_only(of_row + at) : 0u;
                        }
                    }
                });
            const int64_t first = token + lane_id() / 4;
            const int tokens = int(smaller(kRound, product.tokens - first));
            const auto* const of_x = static_cast<const uint16_t*>(product.x) +
                                     first * product.x_stride +
                                     (kTwin ? row : span.column + column_of());
            SPEFT_UNROLL
            for (int i = 0; i < kPieces; ++i)
                SPEFT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const bool real = (kTwin ? below(4 * i) < rows : across) && 8 * half < tokens;
                const int64_t piece = kTwin ? below(4 * i) : i * part_width<kBase>(product);
                x[i][half] = load<kPiece>(of_x + 8 * half * product.x_stride + piece, real);
            }
        }
    }

    // Columns 2 w and 2 w + 1 of row `line` of W, as numbers of T.
    template <class Scale>
    SPEFT_DEVICE uint32_t along(int line, int w, int part) const {
        return number_pair<T, kBase, Scale>(weight[line], w, part, scales[part][line]);
    }

    // Column `column` of row `line` of W and of the next, as numbers of T.
    template <class Scale>
    SPEFT_DEVICE uint32_t down(int line, int column, int part) const {
        return number_pair<T, kBase, Scale>(beside(weight[line], column, weight[line + 1], column),
                                            part, scales[0][line], scales[0][line + 1]);
    }

    // Four of a piece of x, from element `from` on, as the product takes them.
    SPEFT_DEVICE void rows_of_x(uint32_t (&rows)[4], int piece, int from) const {
        SPEFT_UNROLL
        for (int i = 0; i < 4; ++i)
            rows[i] = x[piece][i % 2].words[from / 2 + i / 2];
    }
};

// An entry whose value is still to be asked for.
struct Known {
    unsigned place;
    int value;  // where it stands; none: -1
};

SPEFT_DEVICE Known known_of(const DeltaProduct& product, int at, int end) {
    if (at >= end) return {0u, -1};
    return {product.places[at], product.order[at]};
}

SPEFT_DEVICE Entry entry_of(const DeltaProduct& product, Known known) {
    return {known.place, known.value < 0 ? 0.0f : product.values[known.value]};
}

// The entries of the tiles of D that half a warp meets in its turns, one run a tile. Three loads
// lead to an entry, each by what the one before brought, and each has a whole turn to arrive: where
// the run stands is asked for three turns before the entry is needed, its place two, its value one.
template <int kRuns>
struct Ahead {
    Run now[kRuns], next[kRuns], later[kRuns];
    Entry mine[kRuns];   // of `now`, the first of each lane
    Known known[kRuns];  // of `next`
};

// Which entries a half of a warp takes, each lane of it for a token: of x @ W^T every other one of
// a run, into sums of its own; of the twin those of one of two tiles, which have other outputs.
template <bool kTwin>
struct Half {
    static constexpr int kStep = kTwin ? 1 : 2;
    SPEFT_DEVICE static int number() { return lane_id() / kRound; }
    SPEFT_DEVICE static int token() { return lane_id() % kRound; }
    SPEFT_DEVICE static int first(Run run) {
        return run.begin + (kTwin ? 0 : number()) + token() * kStep;
    }
    // Of a run, those of the half that has more.
    SPEFT_DEVICE static int count(Run run) {
        const int mine = run.end - run.begin;
        if (!kTwin) return (mine + 1) / 2;
        const int others = exchange_from(mine, (lane_id() + kRound) % kWarp);
        return mine > others ? mine : others;
    }
};

// Where the sums of an output stand, a token after the other, in the order in which lanes hold them
// of a product: kSumPitch puts what these, too, add at once in all banks.
constexpr int kSumPitch = kRound + 4;
constexpr int kWarpSums = 2 * kSide * kSumPitch;  // of both halves
template <bool kTwin>
SPEFT_DEVICE int place_of_output(unsigned output) {
    return int(kTwin ? output % 8 * 8 + output / 8 : output) * kSumPitch;
}

// Adds the entries of a tile of D to the sums of this lane's token, of which x begins at the tile's
// first column. `mine` is the lane's first entry of its half. An entry takes a lane a token, so no
// other lane has its sum.
template <class T, bool kTwin>
SPEFT_DEVICE void add_entries(float* sums, const DeltaProduct& product, Run run, Entry mine,
                              const T* x) {
    constexpr int kTogether = 4;  // entries whose x is asked for before the first is needed
    static_assert(kRound % kTogether == 0, "what a lane knows of is taken in whole turns");
    using Its = Half<kTwin>;
    const int count = Its::count(run), lane = Its::number() * kRound;
    const int own = run.end - Its::first(run) + Its::token() * Its::kStep;
    for (int e = 0; e < count; e += kTogether) {
        if (e > 0 && e % kRound == 0)
            mine = entry_of(product, Its::first(run) + e * Its::kStep, run.end);
        const int source = lane + e % kRound, left = own - e * Its::kStep;
        int places[kTogether];
        float values[kTogether];
        T of_x[kTogether];
        SPEFT_UNROLL
        for (int i = 0; i < kTogether; ++i) {
            const unsigned place = exchange_from(mine.place, source + i);
            values[i] = exchange_from(mine.value, source + i);
            of_x[i] = x[kTwin ? place / kSide : place % kSide];  // of no entry, the first
            places[i] = place_of_output<kTwin>(kTwin ? place % kSide : place / kSide);
        }
        SPEFT_UNROLL
        for (int i = 0; i < kTogether; ++i)
            sums[places[i]] += i * Its::kStep < left ? widen(of_x[i]) * values[i] : 0.0f;
    }
}

// 0 leaves it to ptxas how many blocks a multiprocessor holds; of the kernels without a base, and
// of the twin over words, it would hold so many that it spills.
template <class T, Base kBase, bool kTwin>
SPEFT_KERNEL(kWarps* kWarp, kBase == Base::kNone || (kBase == Base::kInt4 && kTwin) ? 1 : 0)
multiply_few(DeltaProduct product) {
    constexpr int kParts = Stored<kBase>::kParts;
    constexpr int kWide = kFewOutputs<kTwin>, kAcross = kWide / 8;
    constexpr int kSums = kWide * kSumPitch;
    // Turns in registers: as many as there is room for beside what words are widened to.
    constexpr int kAhead = kBase == Base::kInt4 ? 1 : 2;
    using Part = Turn<T, kBase, kTwin>;

    // In 32 bits, for 64 are divided by a hundred instructions; the grid is no larger.
    const unsigned in_part = unsigned(parts_of(part_width<kBase>(product), kWide));
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

    // The runs of a turn: for each half of the twin's warp its tile's, else those of the words'
    // parts.
    constexpr int kRuns = kTwin ? 1 : kParts;
    using Its = Half<kTwin>;
    Ahead<kRuns> delta;
    const auto run_at = [&](int turn, int i) -> Run {
        if (turn >= turns || (kTwin && Its::number() >= outputs.tiles)) return {0, 0};
        return kTwin ? run_of<kBase>(product, turn, outputs.tile + Its::number())
                     : run_of<kBase>(product, row / kSide,
                                     span_of<kBase, kSide>(product, turn, i).tile);
    };
    const auto first_known = [&](Run run) { return known_of(product, Its::first(run), run.end); };
    SPEFT_UNROLL
    for (int i = 0; i < kRuns; ++i) {
        delta.now[i] = run_at(warp_id(), i);
        delta.next[i] = run_at(warp_id() + kWarps, i);
        delta.later[i] = run_at(warp_id() + 2 * kWarps, i);
    }

    float sums[kAcross][4] = {};
    Part ring[kAhead];
    const auto bring = [&](Part& to, int turn) {
        if (turn < turns) to.bring(product, token, above_at(turn), span_at(turn));
    };
    SPEFT_UNROLL
    for (int i = 0; i < kAhead; ++i)
        bring(ring[i], warp_id() + i * kWarps);
    SPEFT_UNROLL
    for (int i = 0; i < kRuns; ++i) {
        const Known first = first_known(delta.now[i]);
        delta.known[i] = first_known(delta.next[i]);
        delta.mine[i] = entry_of(product, first);
    }

    // The entries' sums of each half of a warp, to which those of its products come at the end.
    auto* const all = shared_memory<float>();
    for (int i = int(threadIdx.x); i < kWarps * kWarpSums; i += kWarps * kWarp)
        all[i] = 0.0f;
    sync_block();  // others than who adds to them have made them zero
    float* const of_warp = all + warp_id() * kWarpSums;
    float* const of_half =
        of_warp + Its::token() + (kTwin ? place_of_output<kTwin>(kSide) : kSums) * Its::number();
    // Of tokens that are not there, whose sums no one reads, the first one's.
    const int64_t my_token = token + Its::token() < product.tokens ? token + Its::token() : token;
    const auto* const my_x = static_cast<const T*>(product.x) + my_token * product.x_stride;
    for (int begin = warp_id(); begin < turns; begin += kAhead * kWarps) {
        SPEFT_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            const int turn = begin + i * kWarps;
            if (turn >= turns) break;
            const int64_t above = above_at(turn);
            if constexpr (kBase != Base::kNone && kTwin) {
                const int part = int(blockIdx.x / in_part);
                by_scales<kBase>(product, [&](const auto* all) {
                    using Scale = std::decay_t<decltype(*all)>;
                    SPEFT_UNROLL
                    for (int step = 0; step < 2; ++step) {
                        uint32_t rows[4];
                        ring[i].rows_of_x(rows, step, 0);
                        SPEFT_UNROLL
                        for (int j = 0; j < kAcross; ++j) {
                            const uint32_t columns[2] = {
                                ring[i].template down<Scale>(4 * step, j, part),
                                ring[i].template down<Scale>(4 * step + 2, j, part)};
                            mma_m16n8k16<T>(sums[j], rows, columns);
                        }
                    }
                });
            }
            if constexpr (kBase != Base::kNone && !kTwin) {
                by_scales<kBase>(product, [&](const auto* all) {
                    using Scale = std::decay_t<decltype(*all)>;
                    SPEFT_UNROLL
                    for (int part = 0; part < kParts; ++part)
                        SPEFT_UNROLL
                    for (int step = 0; step < 2; ++step) {
                        uint32_t rows[4];
                        ring[i].rows_of_x(rows, part, 4 * step);
                        SPEFT_UNROLL
                        for (int j = 0; j < kAcross; ++j) {
                            const uint32_t columns[2] = {
                                ring[i].template along<Scale>(j, 2 * step, part),
                                ring[i].template along<Scale>(j, 2 * step + 1, part)};
                            mma_m16n8k16<T>(sums[j], rows, columns);
                        }
                    }
                });
            }
            bring(ring[i], turn + kAhead * kWarps);
            SPEFT_UNROLL
            for (int r = 0; r < kRuns; ++r) {
                const Run run = delta.now[r];
                const Entry mine = delta.mine[r];
                delta.mine[r] = entry_of(product, delta.known[r]);
                delta.known[r] = first_known(delta.later[r]);
                delta.now[r] = delta.next[r];
                delta.next[r] = delta.later[r];
                delta.later[r] = run_at(turn + 3 * kWarps, r);
                const int64_t first =
                    kTwin ? above : span_of<kBase, kSide>(product, turn, r).column;
                add_entries<T, kTwin>(of_half, product, run, mine, my_x + first);
            }
        }
    }

    sync_block();  // the entries of all lanes are added
    SPEFT_UNROLL
    for (int j = 0; j < kAcross; ++j)
        SPEFT_UNROLL
    for (int v = 0; v < 4; ++v)
        of_warp[(j * 8 + lane_id() % 4 * 2 + v % 2) * kSumPitch + lane_id() / 4 + v / 2 * 8] +=
            sums[j][v];
    sync_block();  // the sums of all warps are there
    const int64_t width = kTwin ? product.cols : product.rows;
    const auto* const bias = static_cast<const T*>(product.bias);
    auto* const y = static_cast<T*>(product.y);
    for (int i = int(threadIdx.x); i < kRound * kWide; i += kWarps * kWarp) {
        const int64_t r = token + i / kWide;
        const int c = i % kWide;
        if (r >= product.tokens || c >= count) continue;
        float total = bias ? widen(bias[first + c]) : 0.0f;
        const float* const at = all + place_of_output<kTwin>(c) + i / kWide;
        for (int part = 0; part < kWarps * kWarpSums / kSums; ++part)
            total += at[part * kSums];
        y[r * width + first + c] = narrow<T>(total);
    }
}

}  // namespace cuda
}  // namespace speft
