// write_delta: W[idx] = cast(base + values), or base, for all weights of a model.
//
// Count (E entries, 16-bit weight): reads 4 E of indices, 2 E of base and 4 E of values in order,
// and writes 2 E, each to a 32-byte sector of its own: 10 E bytes and E sectors, so 42 E bytes of
// traffic. A launch takes kBatch weights, whose addresses travel as its argument: there is no table
// to upload, and a CUDA graph holds the addresses.
#include <algorithm>
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace speft {
namespace cuda {
namespace {

constexpr int kBatch = 64;
constexpr int kThreads = 256;
constexpr int kEach = 4;  // entries of a thread: as many writes in flight
constexpr int kTile = kThreads * kEach;

struct Batch {
    DeltaWrite deltas[kBatch];
    int64_t first[kBatch + 1];  // first block of each weight
    int count;
};

template <class T, class Index>
SPEFT_DEVICE void write_tile(const DeltaWrite& delta, int64_t start) {
    T* weight = static_cast<T*>(delta.weight);
    const Index* indices = static_cast<const Index*>(delta.indices);
    const T* base = static_cast<const T*>(delta.base);
    const auto* values = static_cast<const Accumulator<T>*>(delta.values);
    // Everything is read before anything is written: the compiler cannot know that no weight is
    // also a base, and would wait for each write's operands in turn.
    Index where[kEach];
    T wanted[kEach];
    SPEFT_UNROLL
    for (int i = 0; i < kEach; ++i) {
        const int64_t e = start + i * kThreads + threadIdx.x;
        if (e >= delta.nnz) continue;
        where[i] = indices[e];
        wanted[i] = values == nullptr ? base[e] : narrow<T>(widen(base[e]) + values[e]);
    }
    SPEFT_UNROLL
    for (int i = 0; i < kEach; ++i)
        if (start + i * kThreads + threadIdx.x < delta.nnz) weight[where[i]] = wanted[i];
}

template <class T>
SPEFT_KERNEL(kThreads)
write_batch(Batch batch) {
    int low = 0, high = batch.count;  // the last weight whose first block is not beyond this one
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (int64_t(blockIdx.x) < batch.first[middle] ? high : low) = middle;
    }
    const DeltaWrite& delta = batch.deltas[low];
    const int64_t start = (int64_t(blockIdx.x) - batch.first[low]) * kTile;
    if (delta.wide_indices)
        write_tile<T, int64_t>(delta, start);
    else
        write_tile<T, int32_t>(delta, start);
}

}  // namespace

int write_delta(const DeltaWrite* deltas, int64_t count, DType dtype, void* stream) {
    for (int64_t start = 0; start < count; start += kBatch) {
        Batch batch;
        batch.count = 0;
        int64_t blocks = 0;
        for (int64_t i = start; i < std::min(count, start + kBatch); ++i) {
            if (deltas[i].nnz == 0) continue;
            batch.deltas[batch.count] = deltas[i];
            batch.first[batch.count++] = blocks;
            blocks += (deltas[i].nnz + kTile - 1) / kTile;
        }
        if (blocks == 0) continue;
        const int error = by_type(dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            return launch(write_batch<T>, dim3(unsigned(blocks)), kThreads, 0, stream, batch);
        });
        if (error != 0) return error;
    }
    return 0;
}

}  // namespace cuda
}  // namespace speft
