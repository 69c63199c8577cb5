// topk_salience: the k largest scores of each segment, which is a matrix, or all of them together.
//
//   find_bound      some thousand keys of each segment give a bound that leaves clearly more than k
//                   entries at or above it
//   collect         the one read of the data: each tile sets these entries aside, as a run of its
//                   own, and adds them to a histogram of 13 bits of what they are above the bound
//   find_threshold  the k-th largest of them, by a second histogram of the 14 bits below
//   count_kept      how many keys of each tile lie above the k-th, and how many equal it; and of
//                   each 64 tiles, and each 64 of these
//   write_kept      the indices, in order
//
// Or all five as one launch, select_resident, of as many blocks as are there at once: they wait for
// each other at four barriers of the grid.
//
// A segment whose bound has left fewer than k entries, or more than there is room for (many equal
// scores, k above an eighth of all, or room for 2^32), has no index then; nor one whose k-th key is
// 2^27 above the bound, which for positive scores is 2^16 times it. The host sees that by the
// numbers that it waits for anyway, and launches what takes such segments' data in place of their
// lists:
//
//   start_over      empties their histograms
//   count_digit     three times: the k-th largest key, by histograms of 11 bits
//   count_kept, write_kept
//
// Count (N entries, operands of b bytes together, c N entries set aside): b N bytes read, 6 c N
// written and 14 c N read again, 8 k of indices. c = (s + 6 sqrt(s) + 8) / S where s = k S / N of S
// samples are expected to be selected: 1.9 % for k of 0.5 % and S = 2048, 1.1 % for S = 8192. So
// |w g| in bf16 takes 1.10, or 1.06, reads of its operands. Over data: three reads more, one for
// the counts, and one of those tiles that keep something: six at most. Scratch: 6 bytes for each
// entry that there is room for (N / 4 at most, or S where N is less), 16 bytes a tile, and 98 KB a
// segment. Instructions of the one read, of 16-bit numbers: 15 an entry for two operands, of which
// an H200 has time for 27, and 12 for one, of which it has time for 13; 5.5 and 4.3 of them
// compare, shift or add integers, of which it begins one in two cycles.
//
// In one launch a block stays for several tiles. So fewer loads are under way: 64 KB of two
// operands a multiprocessor, and 32 of one, in place of 128 and 96. At 4.3 TB/s and an assumed
// latency of 0.8 us it takes 26.
//
// Where a tile's run lies depends on which tile came first, and the order within it is that of the
// tile; what comes out depends on nothing but the scores.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "topk_kernels.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kFewSamples = 11, kManySamples = 13;  // bits
// Where reading takes a millisecond, four times the samples are paid for by what is not set aside.
constexpr int64_t kManyEntries = int64_t(1) << 29;

int64_t samples_of(const TopkSizes& sizes) {
    return int64_t(1) << sizes.sample_bits;
}

// Of the k largest of `size` entries about s = k samples / size are sampled, with a standard
// deviation of sqrt(s) or less: six of them on, fewer than k entries lie above the bound about once
// in 1e9 times. The room is for six standard deviations more, and bins count to 2^32.
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
    segment.capacity = most > std::min(size / 4, double(UINT32_MAX)) ? 0 : int64_t(most);
}

// How many entries reach the bound, if the samples are like the rest.
int64_t expected_list(const Segment& segment, int64_t samples) {
    return segment.size <= samples ? segment.k : segment.sample_rank * (segment.size / samples);
}

// Two blocks of kThreads fill a multiprocessor; of segments that differ in size, more waves than
// one let those that end early make room.
int64_t blocks_of_each(const TopkSizes& sizes, int64_t segments, int64_t waves) {
    return std::max<int64_t>(1, waves * 2 * sizes.multiprocessors / segments);
}

// Parts a piece of memory.
class Parting {
  public:
    explicit Parting(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        void* const taken = memory_ == nullptr ? nullptr : memory_ + taken_;
        taken_ += parts_of(count * int64_t(sizeof(T)), 256) * 256;
        return static_cast<T*>(taken);
    }

    int64_t taken() const { return taken_; }

  private:
    char* memory_;
    int64_t taken_ = 0;
};

// Gives `work` its parts of the scratch; returns how much it is.
int64_t part_scratch(Work& work, void* scratch) {
    const TopkSizes& sizes = work.sizes;
    Parting parting(scratch);
    work.states = parting.take<State>(sizes.segments);
    work.histograms = parting.take<uint32_t>(sizes.segments * kListWords);
    work.kept = parting.take<uint32_t>(sizes.tiles);
    work.groups = parting.take<uint64_t>(sizes.groups);
    work.supers = parting.take<uint64_t>(sizes.supers);
    work.pending = parting.take<uint32_t>(1 + sizes.segments);
    work.run_start = parting.take<int64_t>(sizes.tiles);
    work.run_length = parting.take<uint32_t>(sizes.tiles);
    work.keys = parting.take<uint32_t>(sizes.room);
    work.places = parting.take<uint16_t>(sizes.room);
    return parting.taken();
}

int64_t tile_entries(DType dtype) {
    return dtype == DType::kFloat32 ? kTile<float> : kTile<BFloat16>;
}

template <class From>
int write_indices(const Work& work, void* stream) {
    const dim3 grid(unsigned(parts_of(work.sizes.tiles, kFewTiles)));
    const int error = launch(count_kept<From>, grid, kFew, 0, stream, work);
    if (error != 0) return error;
    return launch(write_kept<From>, grid, kFew, sizeof(Told<kFewTiles>), stream, work);
}

template <class T, bool kPair>
int select_of_lists(const Work& work, void* stream) {
    const TopkSizes& sizes = work.sizes;
    const int64_t parts = sizes.segments * sizes.list_parts;
    if (std::max(sizes.tiles, parts) > INT32_MAX) return kUnsupported;
    int error = launch(find_bound<T, kPair>, dim3(unsigned(sizes.segments)), kThreads,
                       shared_with(kBins + samples_of(sizes)), stream, work);
    if (error != 0) return error;
    error = launch(collect<T, kPair>, dim3(unsigned(sizes.tiles)), kThreads, sizeof(Collecting),
                   stream, work);
    if (error != 0) return error;
    error = launch(find_threshold, dim3(unsigned(parts)), kThreads, shared_with(kLowBins), stream,
                   work);
    if (error != 0) return error;
    return write_indices<OfList<kTile<T>>>(work, stream);
}

template <class T, bool kPair>
int select_of_data(const Work& work, int64_t pending, void* stream) {
    const TopkSizes& sizes = work.sizes;
    // Bins of a block count to 2^32.
    const int64_t parts = std::max(std::min(sizes.most_tiles, blocks_of_each(sizes, pending, 2)),
                                   parts_of(sizes.most_tiles, int64_t(UINT32_MAX) / kTile<T>));
    if (pending * parts > INT32_MAX) return kUnsupported;
    int error = launch(start_over, dim3(unsigned(sizes.segments)), kThreads, 0, stream, work);
    for (int level = 0; level < kLevels && error == 0; ++level)
        error = launch(count_digit<T, kPair>, dim3(unsigned(pending * parts)), kThreads,
                       shared_with(kBins), stream, work, level, int(parts));
    if (error != 0) return error;
    return write_indices<OfData<T, kPair>>(work, stream);
}

template <class T, bool kPair>
int select_at_once(const Work& work, void* stream) {
    const size_t shared = std::max(
        {shared_with(kBins + samples_of(work.sizes)), sizeof(Collecting), shared_with(kLowBins)});
    return launch_resident(select_resident<T, kPair>, work.sizes.multiprocessors, kThreads, shared,
                           stream, work);
}

template <class T, bool kPair>
int select(const Work& work, const TopkCall& call, void* stream) {
    if (call.pending > 0) return select_of_data<T, kPair>(work, call.pending, stream);
    return call.resident ? select_at_once<T, kPair>(work, stream)
                         : select_of_lists<T, kPair>(work, stream);
}

}  // namespace

TopkPlan plan_topk(const TopkProblem& problem) {
    const size_t matrices = problem.sizes.size(), segments = problem.ks.size();
    std::vector<Matrix> of_matrices(matrices);
    std::vector<Segment> of_segments(segments);
    TopkPlan plan = {};
    TopkSizes& sizes = plan.sizes;
    sizes.matrices = int64_t(matrices);
    sizes.segments = int64_t(segments);
    sizes.together = problem.together;
    const int64_t tile = tile_entries(problem.dtype);
    sizes.multiprocessors = problem.multiprocessors;
    int64_t total = 0;
    for (size_t i = 0; i < matrices; ++i) {
        const int64_t tiles = parts_of(problem.sizes[i], tile);
        of_matrices[i] = {problem.x[i], problem.y.empty() ? nullptr : problem.y[i],
                          problem.sizes[i], sizes.tiles, problem.together ? total : 0};
        Segment& segment = of_segments[problem.together ? 0 : i];
        if (segment.tiles == 0) segment.first_tile = sizes.tiles;
        segment.size += problem.sizes[i];
        segment.tiles += tiles;
        sizes.most_tiles = std::max(sizes.most_tiles, segment.tiles);
        sizes.tiles += tiles;
        total += problem.sizes[i];
    }
    sizes.sample_bits = total >= kManyEntries ? kManySamples : kFewSamples;
    int64_t out = 0, most_listed = 1;
    for (size_t i = 0; i < segments; ++i) {
        Segment& segment = of_segments[i];
        segment.k = problem.ks[i];
        set_sampling(segment, samples_of(sizes));
        segment.list = sizes.room;
        segment.out = out;
        segment.first_group = sizes.groups;
        sizes.groups += groups_of(segment);
        segment.first_super = sizes.supers;
        sizes.supers += supers_of(segment);
        most_listed = std::max(most_listed, expected_list(segment, samples_of(sizes)));
        sizes.room += parts_of(segment.capacity, 4) * 4;  // keys are read four at a time
        out += segment.k;
    }
    // Each has a vector for each thread at least: it reads 33 KB of the histogram beside.
    sizes.list_parts =
        std::min(parts_of(most_listed, 4 * kThreads), blocks_of_each(sizes, int64_t(segments), 4));

    const size_t matrix_bytes = matrices * sizeof(Matrix);
    plan.table.resize(matrix_bytes + segments * sizeof(Segment));
    std::memcpy(plan.table.data(), of_matrices.data(), matrix_bytes);
    std::memcpy(plan.table.data() + matrix_bytes, of_segments.data(), segments * sizeof(Segment));

    Work work = {};
    work.sizes = sizes;
    plan.scratch_bytes = part_scratch(work, nullptr);
    return plan;
}

int topk_salience(const TopkSizes& sizes, const TopkCall& call, DType dtype, void* stream) {
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
    part_scratch(work, call.scratch);
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (std::is_same<T, double>::value)
            return kUnsupported;
        else
            return pair ? select<T, true>(work, call, stream)
                        : select<T, false>(work, call, stream);
    });
}

}  // namespace cuda
}  // namespace speft
