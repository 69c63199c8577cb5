// Threads and scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>
#ifdef _OPENMP
    #include <omp.h>
#endif
#ifdef __SSE__
    #include <xmmintrin.h>
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

// How a thread rounds, and whether it flushes denormals (torch.set_flush_denormal): that of a
// team's caller, for as long as a worker works for it. Each thread has its own. On x86 alone;
// elsewhere the others go by theirs.
class Rounding {
  public:
#ifdef __SSE__
    static unsigned of_this_thread() { return _mm_getcsr(); }
    explicit Rounding(unsigned callers) : own_(_mm_getcsr()) { _mm_setcsr(callers); }
    ~Rounding() { _mm_setcsr(own_); }

  private:
    unsigned own_;
#else
    static unsigned of_this_thread() { return 0; }
    explicit Rounding(unsigned) {}
#endif
};

// Runs f(worker) on `threads` threads. With one thread OpenMP is left out, because its runtime does
// not survive a fork() in which it was already running, and data loaders fork.
template <class F>
void parallel([[maybe_unused]] int threads, F&& f) {
#ifdef _OPENMP
    if (threads > 1) {
        const unsigned callers = Rounding::of_this_thread();
    #pragma omp parallel num_threads(threads)
        {
            const Rounding as_the_caller(callers);
            f(Worker{omp_get_thread_num(), omp_get_num_threads()});
        }
        return;
    }
#endif
    f(Worker{0, 1});
}

// As many threads as have `each` of the work: to wake one costs as much as it would save below
// that, and the others wait for it where a busy machine has descheduled it.
inline int threads_for(int64_t work, int64_t each, int threads) {
    return int(std::min<int64_t>(threads, work / each + 1));
}

// Scratch memory of earlier calls, kept by the thread that made them: memory fresh from the system
// is mapped and zeroed page by page on first use, which took a quarter of a short call.
class ScratchCache {
  public:
    static ScratchCache& of_this_thread() {
        static thread_local ScratchCache cache;
        return cache;
    }
    ~ScratchCache() { clear(); }

    void clear() {
        for (const Block& block : blocks_)
            std::free(block.memory);
        blocks_.clear();
        kept_ = 0;
    }

    // `bytes` of memory, aligned for vectors. Throws std::bad_alloc.
    void* take(size_t bytes) {
        blocks_.reserve(kMostBlocks);  // so that give_back cannot throw
        const auto same = [bytes](const Block& block) { return block.bytes == bytes; };
        const auto found = std::find_if(blocks_.begin(), blocks_.end(), same);
        if (found != blocks_.end()) {
            void* memory = found->memory;
            blocks_.erase(found);
            kept_ -= bytes;
            return memory;
        }
        void* memory = std::aligned_alloc(kVectorBytes, bytes);
        if (memory == nullptr) throw std::bad_alloc();
        return memory;
    }

    void give_back(void* memory, size_t bytes) {
        if (bytes > kMostBytes || blocks_.size() == kMostBlocks) return std::free(memory);
        // The oldest go first, so that sizes no longer in use do not stay.
        while (kept_ + bytes > kMostBytes) {
            std::free(blocks_.front().memory);
            kept_ -= blocks_.front().bytes;
            blocks_.erase(blocks_.begin());
        }
        blocks_.push_back({memory, bytes});
        kept_ += bytes;
    }

  private:
    static constexpr size_t kMostBytes = 16 << 20, kMostBlocks = 256;
    struct Block {
        void* memory;
        size_t bytes;
    };
    std::vector<Block> blocks_;
    size_t kept_ = 0;
};

struct ReturnToCache {
    size_t bytes;
    void operator()(void* memory) const { ScratchCache::of_this_thread().give_back(memory, bytes); }
};
template <class T>
using Scratch = std::unique_ptr<T[], ReturnToCache>;

// Uninitialised, aligned for vectors. Throws std::bad_alloc, so call it outside `parallel`; and let
// the thread that called it release it.
template <class T>
Scratch<T> scratch(int64_t count) {
    // In whole pages, so that calls of slightly different sizes share blocks.
    constexpr size_t kPage = 4096;
    const size_t bytes = (size_t(count) * sizeof(T) / kPage + 1) * kPage;
    void* memory = ScratchCache::of_this_thread().take(bytes);
    return Scratch<T>(static_cast<T*>(memory), ReturnToCache{bytes});
}

}  // namespace speft
