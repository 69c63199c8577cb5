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
    float scales[kScaledParts][kLines];
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
                if constexpr (Stored<kBase>::kQuantized) {
                    SPEFT_UNROLL
                    for (int part = 0; part < kScaledParts; ++part) {
                        const int64_t first = span.column + part * part_width<kBase>(product);
                        const int group = group_of(product, first + column_of());
                        scales[part][i] = real ? scale_at<T>(product, row, group) : 0.0f;
                    }
                }
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
    SPEFT_DEVICE Some<uint16_t> numbers(int line, int part) const {
        if constexpr (Stored<kBase>::kQuantized)
            return widened<T, kBase>(weight[line], part, scales[kTwin ? 0 : part][line]);
        else
            return weight[line];
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

// The entries of the tiles of D that a warp meets in its turns, one run a tile: where a run stands
// is asked for two turns before its first entries are needed, what is known of those one turn
// before, and their values where that turn begins.
template <int kRuns>
struct Ahead {
    Run now[kRuns], next[kRuns];
    Known known[kRuns];  // of `now`, the first of each lane
};

// Adds the entries of a tile of D, that begins at column `first` of x and column `beside` of the
// warp's outputs, to its sums. `mine` is the lane's first entry of the run.
template <class T, bool kTwin, int kAcross>
SPEFT_DEVICE void add_entries(float (&sums)[kAcross][4], const DeltaProduct& product, Run run,
                              Entry mine, int64_t token, int64_t first, int beside) {
    // Entries whose x is asked for before the first is needed; four would spill.
    constexpr int kTogether = 3;
    const int group = lane_id() / 4, place = lane_id() % 4;
    const auto* const x = static_cast<const T*>(product.x) + first;
    const int64_t one = token + group, two = one + 8;
    for (int begin = run.begin; begin < run.end; begin += kWarp) {
        if (begin > run.begin) mine = entry_of(product, begin + lane_id(), run.end);
        const int count = run.end - begin < kWarp ? run.end - begin : kWarp;
        for (int e = 0; e < count; e += kTogether) {
            int holds[kTogether];  // which of the lane's sums; none of them: -1
            float values[kTogether], x_one[kTogether], x_two[kTogether];
            SPEFT_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                const int source = e + i < count ? e + i : e;
                const unsigned at = exchange_from(mine.place, source);
                values[i] = exchange_from(mine.value, source);
                const int from = int(kTwin ? at / kSide : at % kSide);
                const unsigned to = unsigned(beside) + (kTwin ? at % kSide : at / kSide);
                // Which of the lanes, the products and their two columns holds output `to`.
                const int holder = int(kTwin ? to / 16 : to % 8 / 2);
                const int tile = int(kTwin ? to % 8 : to / 8);
                const int side = int(kTwin ? to / 8 % 2 : to % 2);
                const bool held = e + i < count && holder == place;
                holds[i] = held ? 2 * tile + side : -1;
                x_one[i] =
                    held && one < product.tokens ? widen(x[one * product.x_stride + from]) : 0.0f;
                x_two[i] =
                    held && two < product.tokens ? widen(x[two * product.x_stride + from]) : 0.0f;
            }
            SPEFT_UNROLL
            for (int i = 0; i < kTogether; ++i)
                SPEFT_UNROLL
            for (int j = 0; j < kAcross; ++j)
                SPEFT_UNROLL
            for (int s = 0; s < 2; ++s) {
                if (holds[i] == 2 * j + s) {
                    sums[j][s] += x_one[i] * values[i];
                    sums[j][2 + s] += x_two[i] * values[i];
                }
            }
        }
    }
}

// 0 leaves it to ptxas how many blocks a multiprocessor holds; of the smallest kernel, that without
// a base, it would hold so many that it spills.
template <class T, Base kBase, bool kTwin>
SPEFT_KERNEL(kWarps* kWarp, kBase == Base::kNone ? 1 : 0)
multiply_few(DeltaProduct product) {
    constexpr int kParts = Stored<kBase>::kParts;
    constexpr int kWide = kFewOutputs<kTwin>, kAcross = kWide / 8, kSumPitch = kWide + kSumPad;
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

    // The runs of a turn: of tiles beside each other for the twin, else of the parts of the words.
    constexpr int kRuns = kTwin ? 2 : kParts;
    Ahead<kRuns> delta;
    const auto run_at = [&](int turn, int i) -> Run {
        if (turn >= turns || (kTwin && i >= outputs.tiles)) return {0, 0};
        return kTwin ? run_of<kBase>(product, turn, outputs.tile + i)
                     : run_of<kBase>(product, row / kSide,
                                     span_of<kBase, kSide>(product, turn, i).tile);
    };
    const auto first_known = [&](Run run) {
        return known_of(product, run.begin + lane_id(), run.end);
    };
    SPEFT_UNROLL
    for (int i = 0; i < kRuns; ++i) {
        delta.now[i] = run_at(warp_id(), i);
        delta.next[i] = run_at(warp_id() + kWarps, i);
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
    for (int i = 0; i < kRuns; ++i)
        delta.known[i] = first_known(delta.now[i]);
    for (int begin = warp_id(); begin < turns; begin += kAhead * kWarps) {
        SPEFT_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            const int turn = begin + i * kWarps;
            if (turn >= turns) break;
            const int64_t above = above_at(turn);
            Entry mine[kRuns];
            SPEFT_UNROLL
            for (int r = 0; r < kRuns; ++r)
                mine[r] = entry_of(product, delta.known[r]);
            if constexpr (kBase != Base::kNone && kTwin) {
                const int part = int(blockIdx.x / in_part);
                SPEFT_UNROLL
                for (int step = 0; step < 2; ++step) {
                    uint32_t rows[4];
                    ring[i].rows_of_x(rows, step, 0);
                    Some<uint16_t> lines[4];
                    SPEFT_UNROLL
                    for (int line = 0; line < 4; ++line)
                        lines[line] = ring[i].numbers(4 * step + line, part);
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
                    const auto line = ring[i].numbers(j, part);
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
            SPEFT_UNROLL
            for (int r = 0; r < kRuns; ++r) {
                const Run run = delta.now[r];
                delta.now[r] = delta.next[r];
                delta.known[r] = first_known(delta.now[r]);
                delta.next[r] = run_at(turn + 2 * kWarps, r);
                const int64_t first =
                    kTwin ? above : span_of<kBase, kSide>(product, turn, r).column;
                add_entries<T, kTwin>(sums, product, run, mine[r], token, first,
                                      kTwin ? r * kSide : 0);
            }
        }
    }

    auto* const all = shared_memory<float>();
    SPEFT_UNROLL
    for (int j = 0; j < kAcross; ++j)
        SPEFT_UNROLL
    for (int v = 0; v < 4; v += 2) {
        const int r = warp_id() * kRound + lane_id() / 4 + v / 2 * 8;
        *reinterpret_cast<Pair*>(all + r * kSumPitch + j * 8 + lane_id() % 4 * 2) = {
            sums[j][v], sums[j][v + 1]};
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
        const int at = i / kWide * kSumPitch + (kTwin ? c % 8 * 8 + c / 8 : c);
        for (int warp = 0; warp < kWarps; ++warp)
            total += all[warp * kRound * kSumPitch + at];
        y[r * width + first + c] = narrow<T>(total);
    }
}

}  // namespace cuda
}  // namespace speft
