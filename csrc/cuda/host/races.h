// What the thread sanitizer is told, so that it sees the threads of a grid where there is one
// thread of the system: which of them runs, and what orders two of them. It then finds any two
// accesses of one place, of shared or global memory, that nothing orders, whether or not they came
// out wrong: in particular between threads of a warp and of different blocks, which fibers never
// let interleave.
//
// What orders, as in PTX's memory model: the start and the end of a grid, barriers of a block or of
// a grid, and fence() on both sides of an atomic operation. Shuffles, votes and matrix instructions
// wait for a warp but order nothing.
//
// Nothing of this does anything unless SPEFT_TSAN is defined, and the .cpp files here must be
// compiled without the sanitizer: what they keep of the threads is shared by all of them.
#pragma once

#include <cstddef>

#ifdef SPEFT_TSAN
    #include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* at, unsigned long size);
void __tsan_write_range(void* at, unsigned long size);
}
    // Of what the threads hand each other below the kernels' sight.
    #define SPEFT_UNWATCHED __attribute__((no_sanitize("thread")))
#else
    #define SPEFT_UNWATCHED
#endif

namespace speft {
namespace cuda {
namespace host {
namespace races {

#ifdef SPEFT_TSAN
constexpr bool kWatched = true;

// A thread as the sanitizer sees it, ordered after the one that makes it and before none.
class Thread {
  public:
    Thread() : fiber_(__tsan_create_fiber(0)) {}
    ~Thread() { __tsan_destroy_fiber(fiber_); }
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;
    void* fiber() const { return fiber_; }

  private:
    void* fiber_;
};

inline void* current() {
    return __tsan_get_current_fiber();
}
inline void switch_to(void* fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
// What came before release(at) is ordered before what comes after a later acquire(at).
inline void release(const void* at) {
    __tsan_release(const_cast<void*>(at));
}
inline void acquire(const void* at) {
    __tsan_acquire(const_cast<void*>(at));
}
inline void read(const void* at, size_t size) {
    __tsan_read_range(const_cast<void*>(at), size);
}
inline void written(void* at, size_t size) {
    __tsan_write_range(at, size);
}
#else
constexpr bool kWatched = false;

class Thread {
  public:
    void* fiber() const { return nullptr; }
};
inline void* current() {
    return nullptr;
}
inline void switch_to(void*) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void read(const void*, size_t) {}
inline void written(void*, size_t) {}
#endif

}  // namespace races
}  // namespace host
}  // namespace cuda
}  // namespace speft
