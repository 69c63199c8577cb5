// write_delta: W[idx] = cast(base + values), or base. Reads and writes nnz elements, no more.
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace speft {
namespace {

constexpr int64_t kEntriesPerThread = 1
                                      << 14;  // below this a second thread costs more than it saves

template <class T, class Index>
void run(T* weight, const Index* indices, int64_t nnz, const T* base, const Accumulator<T>* values,
         int threads) {
    threads = int(std::min<int64_t>(threads, nnz / kEntriesPerThread + 1));
    parallel(threads, [&](Worker worker) {
        const Range range = worker.share(nnz);
        for (int64_t e = range.begin; e < range.end; ++e) {
            if (values == nullptr)
                weight[indices[e]] = base[e];
            else
                narrow(widen(base[e]) + values[e], &weight[indices[e]]);
        }
    });
}

}  // namespace

void write_delta(void* weight, const void* indices, bool wide_indices, int64_t nnz,
                 const void* base, const void* values, DType dtype, int threads) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto* w = static_cast<T*>(weight);
        const auto* b = static_cast<const T*>(base);
        const auto* v = static_cast<const Accumulator<T>*>(values);
        if (wide_indices)
            run(w, static_cast<const int64_t*>(indices), nnz, b, v, threads);
        else
            run(w, static_cast<const int32_t*>(indices), nnz, b, v, threads);
    });
}

}  // namespace speft
