// Threads and scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#ifdef _OPENMP
    #include <omp.h>
#endif

#include "simd.h"

namespace speft {

struct Range {
    int64_t begin, end;
};

// The share of [0, total) that falls to `part` of `parts`, in multiples of `step`.
inline Range share(int64_t total, int64_t part, int64_t parts, int64_t step = 1) {
    const int64_t steps = (total + step - 1) / step;
    return {std::min(total, steps * part / parts * step),
            std::min(total, steps * (part + 1) / parts * step)};
}

// One thread of a team, or a thread on its own (count 1). `barrier` must be reached by the whole
// team.
struct Worker {
    int index, count;
    Range share(int64_t total, int64_t step = 1) const {
        return speft::share(total, index, count, step);
    }
    void barrier() const {
#ifdef _OPENMP
        if (count > 1) {
    #pragma omp barrier
        }
#endif
    }
};

// Runs f(worker) on `threads` threads. With one thread OpenMP is left out, because its runtime does
// not survive a fork() in which it was already running, and data loaders fork.
template <class F>
void parallel(int threads, F&& f) {
#ifdef _OPENMP
    if (threads > 1) {
    #pragma omp parallel num_threads(threads)
        f(Worker{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    f(Worker{0, 1});
}

struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeDeleter>;

// Uninitialised, aligned for vectors. Throws std::bad_alloc, so call it outside `parallel`.
template <class T>
Scratch<T> scratch(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) / kVectorBytes + 1) * kVectorBytes;
    void* p = std::aligned_alloc(kVectorBytes, size_t(bytes));
    if (p == nullptr) throw std::bad_alloc();
    return Scratch<T>(static_cast<T*>(p));
}

}  // namespace speft
