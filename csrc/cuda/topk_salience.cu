// topk_salience: the k largest scores of each segment, which is a matrix, or all of them together.
//
//   find_bound    some thousand keys of each segment give a bound that leaves clearly more than k
//                 entries at or above it
//   collect       the one read of the data: each tile sets these entries aside, as a run of its own
//   count_digit   three times: the k-th largest of them, by histograms of 11 bits
//   count_kept    how many keys of each tile lie above the k-th, and how many equal it; then sums
//   write_kept    the indices, in order
//
// A segment whose bound has left fewer than k entries, or more than there is room for (many equal
// scores, or k above an eighth of all), takes the last three steps over its data in place of what
// was set aside. The device sees that by itself, segment by segment, so the host waits for nothing.
//
// Count (N entries, operands of b bytes together, c N entries set aside): b N bytes read, 6 c N
// written and 22 c N read again, 8 k of indices. c = (s + 6 sqrt(s) + 8) / S where s = k S / N of S
// samples are expected to be selected: 1.9 % for k of 0.5 % and S = 2048, 1.1 % for S = 8192. So
// |w g| in bf16 takes 1.13, or 1.08, reads of its operands. Over data: three reads more, one for
// the counts, and one of those tiles that keep something: six at most. Scratch: 6 bytes for each
// entry that there is room for, N / 4 at most, and 49 KB a segment. Instructions of the one read,
// of 16-bit numbers: 18 an entry for two operands, of which an H200 has time for 27, and 16 for
// one, of which it has time for 13.
//
// Where a tile's run lies depends on which tile came first, and the order within it on nothing but
// the tile; what comes out depends on neither.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "salience.h"
#include "scan.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFew = 128;  // threads for a tile's run, of some hundred entries
constexpr int kLevels = 3;
constexpr int kDigitBits = 11;  // of the last digit 10
constexpr int kBins = 1 << kDigitBits;
constexpr int kFewSamples = 2048, kManySamples = 8192;
// Where reading takes a millisecond, four times the samples are paid for by what is not set aside.
constexpr int64_t kManyEntries = int64_t(1) << 29;

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

// Which bits of a key a level looks at.
struct Digit {
    int shift;
    int bins;
    uint32_t known;  // the bits of the levels before

    SPEFT_DEVICE uint32_t of(uint32_t key) const { return (key >> shift) & uint32_t(bins - 1); }
};

SPEFT_DEVICE Digit digit_of(int level) {
    if (level == 0) return {32 - kDigitBits, kBins, 0};
    if (level == 1) return {32 - 2 * kDigitBits, kBins, ~0u << (32 - kDigitBits)};
    return {0, kBins / 2, ~0u << (32 - 2 * kDigitBits)};
}

// The sum of what the threads before this one bring, and that of all. Every thread must come, and
// pass another barrier before it comes again.
template <int kBlock, class N>
SPEFT_DEVICE N sum_before(N mine, void* of_warps, N* total) {
    N* const sums = static_cast<N*>(of_warps);
    N running = mine;
    SPEFT_UNROLL
    for (int step = 1; step < kWarp; step *= 2) {
        const N below = exchange_up(running, step);
        if (lane_id() >= step) running += below;
    }
    if (lane_id() == kWarp - 1) sums[warp_id()] = running;
    sync_block();  // the warps' sums are there
    N before = running - mine;
    *total = 0;
    SPEFT_UNROLL
    for (int warp = 0; warp < kBlock / kWarp; ++warp) {
        if (warp < warp_id()) before += sums[warp];
        *total += sums[warp];
    }
    return before;
}

struct Shared {
    uint64_t sums[kWarps];
    uint64_t found[2];  // what one thread tells all
    uint32_t bins[kBins];
};

struct Pick {
    uint32_t digit;
    uint64_t rank;
};

// The digit of the key of `rank`, from the largest, by how many keys have each digit; and its rank
// among the keys that have it, too. Every thread must come, and pass another barrier before it
// comes again.
template <class Count>
SPEFT_DEVICE Pick pick(const Count* bins, int count, uint64_t rank, Shared& shared) {
    constexpr int kEach = kBins / kThreads;
    const int top = count - 1 - int(threadIdx.x) * kEach;
    uint64_t mine = 0, total;
    for (int i = 0; i < kEach; ++i)
        if (top - i >= 0) mine += bins[top - i];
    uint64_t above = sum_before<kThreads>(mine, shared.sums, &total);
    if (above < rank && rank <= above + mine) {
        int digit = top;
        for (; above + bins[digit] < rank; --digit)
            above += bins[digit];
        shared.found[0] = uint64_t(digit);
        shared.found[1] = rank - above;
    }
    sync_block();  // one thread has found it
    return {uint32_t(shared.found[0]), shared.found[1]};
}

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

// Grid: segments. It comes first, and so it also makes the state of each.
template <class T, bool kPair>
SPEFT_KERNEL(kThreads)
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
    const uint32_t before = sum_before<kThreads>(uint32_t(count_bits(hits)), shared.sums, &total);
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

    fence();
    sync_block();  // the block's part is in the histogram
    if (threadIdx.x == 0) shared.found[0] = atomic_add(&state.arrived, 1u) + 1;
    sync_block();  // all know whether theirs was the last
    if (shared.found[0] != uint64_t(parts)) return;
    fence();
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
    sum_before<kFew>(counts, shared_memory<uint32_t>(), &total);
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
    const uint32_t before = sum_before<kFew>(counts, tied + kWords, &total);
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

// Of the k largest of `size` entries about s = k samples / size are sampled, with a standard
// deviation of sqrt(s) or less: six of them on, fewer than k entries lie above the bound about once
// in 1e9 times. The room is for six standard deviations more.
void set_sampling(Segment& segment, int64_t samples) {
    if (segment.size <= samples) {  // all are sampled
        segment.sample_rank = segment.k;
        segment.capacity = segment.size;
        return;
    }
    const auto enough = [](double expected) {
        return std::ceil(expected + 6 * std::sqrt(expected) + 8);
    };
    const double size = double(segment.size), parts = double(samples);
    const double rank = enough(double(segment.k) * parts / size);
    const double most = enough(rank) * size / parts;
    segment.sample_rank = int64_t(rank);
    segment.capacity = most > size / 4 ? 0 : int64_t(most);
}

// Parts a piece of memory.
class Parting {
  public:
    explicit Parting(const void* memory) : at_(reinterpret_cast<uintptr_t>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* const taken = reinterpret_cast<T*>(at_);
        at_ += (uintptr_t(count) * sizeof(T) + 255) / 256 * 256;
        return taken;
    }

    uintptr_t end() const { return at_; }

  private:
    uintptr_t at_;
};

// Gives `work` its parts of the scratch; returns what is left for the sums.
void* part_scratch(Work& work, void* scratch) {
    const TopkSizes& sizes = work.sizes;
    Parting parting(scratch);
    work.states = parting.take<State>(sizes.segments);
    work.histograms = parting.take<uint64_t>(sizes.segments * kLevels * kBins);
    work.kept = parting.take<int64_t>(2 * sizes.tiles + 1);
    work.run_start = parting.take<int64_t>(sizes.tiles);
    work.run_length = parting.take<uint32_t>(sizes.tiles);
    work.keys = parting.take<uint32_t>(sizes.room);
    work.places = parting.take<uint16_t>(sizes.room);
    return reinterpret_cast<void*>(parting.end());
}

int64_t tile_entries(DType dtype) {
    return dtype == DType::kFloat32 ? kTile<float> : kTile<BFloat16>;
}

template <class T, bool kPair>
int select(const Work& work, void* sums, size_t sums_bytes, void* stream) {
    const TopkSizes& sizes = work.sizes;
    if (std::max(sizes.tiles, sizes.segments * sizes.parts) > INT32_MAX) return kUnsupported;
    const dim3 segments(unsigned(sizes.segments)), tiles(unsigned(sizes.tiles));
    const dim3 parts(unsigned(sizes.segments * sizes.parts));
    int error = launch(find_bound<T, kPair>, segments, kThreads,
                       sizeof(Shared) + size_t(sizes.samples) * 4, stream, work);
    if (error != 0) return error;
    error = launch(collect<T, kPair>, tiles, kThreads, sizeof(Shared), stream, work);
    for (int level = 0; level < kLevels && error == 0; ++level)
        error = launch(count_digit<T, kPair>, parts, kThreads, sizeof(Shared), stream, work, level);
    if (error != 0) return error;
    constexpr size_t kSums = kFew / kWarp * sizeof(uint32_t);
    error = launch(count_kept<T, kPair>, tiles, kFew, kSums, stream, work);
    if (error != 0) return error;
    error = sums_before(sums, &sums_bytes, work.kept, 2 * sizes.tiles + 1, stream);
    if (error != 0) return error;
    return launch(write_kept<T, kPair>, tiles, kFew, 2 * kTile<T> / 8 + kSums, stream, work);
}

}  // namespace

int plan_topk(const TopkProblem& problem, Place place, TopkPlan* plan) {
    const DeviceGuard guard(place.device);
    if (guard.error() != 0) return guard.error();
    const size_t matrices = problem.sizes.size(), segments = problem.ks.size();
    std::vector<Matrix> of_matrices(matrices);
    std::vector<Segment> of_segments(segments);
    TopkSizes& sizes = plan->sizes = {};
    sizes.matrices = int64_t(matrices);
    sizes.segments = int64_t(segments);
    sizes.together = problem.together;
    const int64_t tile = tile_entries(problem.dtype);
    int64_t total = 0, most_tiles = 1;
    for (size_t i = 0; i < matrices; ++i) {
        const int64_t tiles = (problem.sizes[i] + tile - 1) / tile;
        of_matrices[i] = {problem.x[i], problem.y.empty() ? nullptr : problem.y[i],
                          problem.sizes[i], sizes.tiles, problem.together ? total : 0};
        Segment& segment = of_segments[problem.together ? 0 : i];
        if (segment.tiles == 0) segment.first_tile = sizes.tiles;
        segment.size += problem.sizes[i];
        segment.tiles += tiles;
        most_tiles = std::max(most_tiles, segment.tiles);
        sizes.tiles += tiles;
        total += problem.sizes[i];
    }
    sizes.samples = total >= kManyEntries ? kManySamples : kFewSamples;
    int64_t out = 0;
    for (size_t i = 0; i < segments; ++i) {
        Segment& segment = of_segments[i];
        segment.k = problem.ks[i];
        set_sampling(segment, sizes.samples);
        segment.list = sizes.room;
        segment.out = out;
        sizes.room += (segment.capacity + 3) / 4 * 4;  // keys are read four at a time
        out += segment.k;
    }
    // Four blocks fill a multiprocessor.
    sizes.parts =
        std::min(most_tiles, std::max<int64_t>(1, 4 * problem.multiprocessors / int64_t(segments)));

    const size_t matrix_bytes = matrices * sizeof(Matrix);
    plan->table.resize(matrix_bytes + segments * sizeof(Segment));
    std::memcpy(plan->table.data(), of_matrices.data(), matrix_bytes);
    std::memcpy(plan->table.data() + matrix_bytes, of_segments.data(), segments * sizeof(Segment));

    Work work = {};
    work.sizes = sizes;
    plan->scratch_bytes = int64_t(reinterpret_cast<uintptr_t>(part_scratch(work, nullptr)));
    size_t sums_bytes = 0;
    const int error = sums_before(nullptr, &sums_bytes, nullptr, 2 * sizes.tiles + 1, place.stream);
    sizes.sums_bytes = int64_t(sums_bytes);
    plan->scratch_bytes += sizes.sums_bytes;
    return error;
}

int topk_salience(const TopkSizes& sizes, const TopkCall& call, DType dtype, Place place) {
    const DeviceGuard guard(place.device);
    if (guard.error() != 0) return guard.error();
    Work work = {};
    work.sizes = sizes;
    // Codes of speft_kernels/ops: magnitude, gradient, snip, force, raw.
    const bool pair = call.metric == 2 || call.metric == 3;
    work.score.flip = call.metric == 3 ? 0x80000000u : 0u;
    work.score.keep = call.metric <= 2 ? 0x7fffffffu : ~0u;
    work.matrices = static_cast<const Matrix*>(call.table);
    work.segments = reinterpret_cast<const Segment*>(work.matrices + sizes.matrices);
    work.indices = call.indices;
    work.told = call.told;
    void* const sums = part_scratch(work, call.scratch);
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (std::is_same<T, double>::value)
            return kUnsupported;
        else
            return pair ? select<T, true>(work, sums, size_t(sizes.sums_bytes), place.stream)
                        : select<T, false>(work, sums, size_t(sizes.sums_bytes), place.stream);
    });
}

}  // namespace cuda
}  // namespace speft
