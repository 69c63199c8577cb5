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

#include "scan.h"
#include "topk_kernels.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kFewSamples = 2048, kManySamples = 8192;
// Where reading takes a millisecond, four times the samples are paid for by what is not set aside.
constexpr int64_t kManyEntries = int64_t(1) << 29;

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
    error = launch(count_kept<T, kPair>, tiles, kFew, sizeof(SumsOfFew), stream, work);
    if (error != 0) return error;
    error = sums_before(sums, &sums_bytes, work.kept, 2 * sizes.tiles + 1, stream);
    if (error != 0) return error;
    return launch(write_kept<T, kPair>, tiles, kFew, 2 * kTile<T> / 8 + sizeof(SumsOfFew), stream,
                  work);
}

}  // namespace

int plan_topk(const TopkProblem& problem, TopkPlan* plan, void* stream) {
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
    const int error = sums_before(nullptr, &sums_bytes, nullptr, 2 * sizes.tiles + 1, stream);
    sizes.sums_bytes = int64_t(sums_bytes);
    plan->scratch_bytes += sizes.sums_bytes;
    return error;
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
    void* const sums = part_scratch(work, call.scratch);
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (std::is_same<T, double>::value)
            return kUnsupported;
        else
            return pair ? select<T, true>(work, sums, size_t(sizes.sums_bytes), stream)
                        : select<T, false>(work, sums, size_t(sizes.sums_bytes), stream);
    });
}

}  // namespace cuda
}  // namespace speft
