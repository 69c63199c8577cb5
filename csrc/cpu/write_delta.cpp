// write_delta: W[idx] = cast(base + values), or base, for all weights of a model in one call. Reads
// and writes as many elements as there are entries, no more.
//
// Count (E entries, float32): reads 12 E bytes in order and writes 4 E, each to a line of its own
// that comes from memory: the time is that of E cache misses, so many are kept in flight.
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace speft {
namespace {

constexpr int64_t kEntriesPerThread = 4096;

// Entries that a line is asked for ahead of its write.
constexpr int64_t kAhead = 32;

template <class T, class Index>
void write(const DeltaWrite& delta, Range range) {
    T* weight = static_cast<T*>(delta.weight);
    const Index* indices = static_cast<const Index*>(delta.indices);
    const T* base = static_cast<const T*>(delta.base);
    const auto* values = static_cast<const Accumulator<T>*>(delta.values);
    for (int64_t e = range.begin; e < range.end; ++e) {
        __builtin_prefetch(weight + indices[std::min(e + kAhead, range.end - 1)], 1);
        if (values == nullptr)
            weight[indices[e]] = base[e];
        else
            narrow(widen(base[e]) + values[e], &weight[indices[e]]);
    }
}

}  // namespace

void write_delta(const DeltaWrite* deltas, int64_t count, DType dtype, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i)
        total += deltas[i].nnz;
    threads = threads_for(total, kEntriesPerThread, threads);
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        // Threads share the entries of all weights as if they stood in one row.
        parallel(threads, [&](Worker worker) {
            const Range mine = worker.share(total);
            int64_t first = 0;  // of the weight's entries, in that row
            for (int64_t i = 0; i < count; first += deltas[i++].nnz) {
                const Range range = {std::max<int64_t>(mine.begin - first, 0),
                                     std::min(mine.end - first, deltas[i].nnz)};
                if (range.begin >= range.end) continue;
                if (deltas[i].wide_indices)
                    write<T, int64_t>(deltas[i], range);
                else
                    write<T, int32_t>(deltas[i], range);
            }
        });
    });
}

}  // namespace speft
