// A block of GPU threads as fibers: fibers.cpp runs it, grid.cpp runs many.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "races.h"

namespace speft {
namespace cuda {
namespace host {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;
constexpr int kLanes = 32;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

enum class State { kReady, kAtBarrier, kAtGrid, kInWarp, kDone };

struct Fiber {
    ucontext_t context;
    unsigned char* stack = nullptr;
    State state = State::kReady;
    int line = 0;                          // where it waits
    int turn = 0;                          // warp operations so far
    std::deque<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    void* fake_stack = nullptr;
    void* watched = nullptr;
    size_t committed = 0;     // groups so far
    void* touched = nullptr;  // by its last atomic operation
    bool fenced = false;
};

struct Warp {
    alignas(16) unsigned char slots[2][kLanes][kSlot];
    int arrived = 0;
    int line = 0;
    // Where the lanes' first, second, ... copies of a group go: one instruction each, of those
    // lanes that make it.
    std::vector<std::vector<std::array<uint64_t, kLanes>>> copies;
};

// What a thread has to itself and costs much to make.
class Place {
  public:
    // Below the stack a page that ends a process whose thread needs more.
    Place()
        : pages_(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        if (pages_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(pages_, kGuard, PROT_NONE);
    }
    ~Place() { munmap(pages_, kGuard + kStack); }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    unsigned char* stack() const { return static_cast<unsigned char*>(pages_) + kGuard; }
    void* watched() const { return watched_.fiber(); }

  private:
    races::Thread watched_;
    void* pages_;
};

class Places {
  public:
    Place& at(size_t index) {
        while (places_.size() <= index)
            places_.emplace_back();
        return places_[index];
    }

  private:
    std::deque<Place> places_;
};

class Block {
  public:
    // Its threads have the places from `first` on.
    Block(int threads, size_t shared_bytes, const std::function<void()>& thread, uint64_t seed,
          Places& places, size_t first)
        : thread_(thread),
          random_(seed),
          fibers_(threads),
          warps_((threads + kLanes - 1) / kLanes),
          shared_(shared_bytes + 16) {
        // Not zero: what a kernel reads before writing it should show.
        std::fill(shared_.begin(), shared_.end(), uint8_t(0xcb));
        for (size_t i = 0; i < fibers_.size(); ++i) {
            fibers_[i].stack = places.at(first + i).stack();
            fibers_[i].watched = places.at(first + i).watched();
        }
    }

    // Runs to the end or to the next barrier of the grid; returns whether it has ended.
    bool run(Index3 block);
    void leave_barrier_of_grid() { release(State::kAtGrid); }

    unsigned char* shared() {
        const auto at = reinterpret_cast<uintptr_t>(shared_.data());
        return shared_.data() + (16 - at % 16) % 16;
    }
    Fiber& current() { return fibers_[size_t(current_)]; }
    int current_index() const { return current_; }
    void barrier(int line);
    void barrier_of_grid(int line);
    void note_copy(const void* to);
    const unsigned char* exchange(const void* mine, size_t size, int line);
    void fail(const std::string& reason) {
        if (error_.empty()) error_ = reason;
    }

  private:
    static void enter();
    void wait(State state, char* passed, int line);
    void pause(State state, int line);
    void switch_to(int next);
    int count(State state) const {
        return int(std::count_if(fibers_.begin(), fibers_.end(),
                                 [=](const Fiber& f) { return f.state == state; }));
    }
    int alive() const { return int(fibers_.size()) - count(State::kDone); }
    void start();
    void release(State state);

    const std::function<void()>& thread_;
    std::mt19937_64 random_;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<unsigned char> shared_;
    ucontext_t main_;
    void* main_fake_stack_ = nullptr;
    const void* main_stack_ = nullptr;
    size_t main_size_ = 0;
    int current_ = -1;
    bool begun_ = false;
    // Half of the blocks run in rounds, each ready fiber once, so that threads stay close together;
    // in the others one warp runs as far as it gets before another one does.
    const bool warp_by_warp_ = random_() % 2 == 1;
    int ahead_ = -1;         // that warp
    int waiting_ = 0;        // at a barrier, of the block or of the grid
    unsigned of_grid_ = 0;   // barriers of the grid that all have passed
    unsigned barriers_ = 0;  // and of the block
    char passed_[2] = {};    // what orders threads at even ones and at odd ones
    char started_ = 0;       // and at the block's start
    char ended_ = 0;         // and its end
    void* const watched_ = races::current();
    std::string error_;
};

}  // namespace host
}  // namespace cuda
}  // namespace speft
