// A block of GPU threads on one CPU thread: each is a fiber, which runs until it has to wait for
// others. Who runs next is drawn at random, all of them by turns or one warp as far as it gets, so
// that what a kernel leaves to chance does go wrong: a thread that reads without a barrier what
// another one writes meets, in some order, the old value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace speft {
namespace cuda {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};

namespace host {

// Runs `thread` once for each of `threads` threads of each block of `grid`, one block after the
// other in a random order; of a `resident` grid, whose blocks may wait for each other, all of them
// from one barrier of the grid to the next. Returns false, with the reason in last_error(), if a
// block cannot end: its threads wait at different barriers, or for lanes or blocks that have left.
bool run_grid(Index3 grid, int threads, size_t shared_bytes, bool resident,
              const std::function<void()>& thread);

// Of all later grids; the same seed gives the same orders.
void set_seed(uint64_t seed);

const std::string& last_error();

// For threads of a running block ---------------------------------------------------------------

unsigned char* shared_memory();
void barrier(int line);
void barrier_of_grid(int line);

// Waits until every lane of the warp has come with `size` bytes of its own, and returns those of
// all of them, one lane after the other, `kSlot` bytes apart. They stay until the next call.
constexpr size_t kSlot = 64;
const unsigned char* exchange(const void* mine, size_t size, int line);
int lane();

// Of 16 bytes that are moved at once, which a GPU moves only so; else the grid ends with an error.
void expect_aligned(const void* at, int line);

// Comes after each atomic operation: it, and what came before a fence before it, is ordered before
// what comes after a fence after a later one, of any thread, at this place.
void at_atomic(void* at);
void fence();

// A copy of 16 bytes that is made as late as `wait` allows.
void copy_later(void* to, const void* from, bool valid);
void commit();
void wait(int pending);

}  // namespace host
}  // namespace cuda
}  // namespace speft
