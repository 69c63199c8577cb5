#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
    #include <sanitizer/common_interface_defs.h>
    #define SPEFT_ASAN 1
#endif

namespace speft {
namespace cuda {

thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kLanes = 32;

uint64_t g_seed = 0;
std::string g_error;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
    ucontext_t context;
    unsigned char* stack = nullptr;
    State state = State::kReady;
    int line = 0;                          // where it waits
    int turn = 0;                          // warp operations so far
    std::deque<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    void* fake_stack = nullptr;
};

struct Warp {
    alignas(16) unsigned char slots[2][kLanes][kSlot];
    int arrived = 0;
    int line = 0;
};

// Kept from block to block: a stack's pages are costly to come by.
unsigned char* stack_of(size_t index) {
    thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() <= index)
        stacks.emplace_back(new unsigned char[kStack]);
    return stacks[index].get();
}

class Block {
  public:
    Block(int threads, size_t shared_bytes, const std::function<void()>& thread, uint64_t seed)
        : thread_(thread),
          random_(seed),
          fibers_(threads),
          warps_((threads + kLanes - 1) / kLanes),
          shared_(shared_bytes + 16) {
        // Not zero: what a kernel reads before writing it should show.
        std::fill(shared_.begin(), shared_.end(), uint8_t(0xcb));
        for (size_t i = 0; i < fibers_.size(); ++i)
            fibers_[i].stack = stack_of(i);
    }

    void run(Index3 block);

    unsigned char* shared() {
        const auto at = reinterpret_cast<uintptr_t>(shared_.data());
        return shared_.data() + (16 - at % 16) % 16;
    }
    Fiber& current() { return fibers_[size_t(current_)]; }
    int current_index() const { return current_; }
    void barrier(int line);
    const unsigned char* exchange(const void* mine, size_t size, int line);

  private:
    static void enter();
    void pause(State state, int line);
    void switch_to(int next);
    void fail(const std::string& reason) {
        if (error_.empty()) error_ = reason;
    }
    int alive() const {
        return int(std::count_if(fibers_.begin(), fibers_.end(),
                                 [](const Fiber& f) { return f.state != State::kDone; }));
    }
    void release_barrier();

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
    int at_barrier_ = 0;
    std::string error_;
};

thread_local Block* t_block = nullptr;

void deliver(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    copies.clear();
}

void Block::enter() {
    Block& block = *t_block;
#ifdef SPEFT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_size_);
#endif
    block.thread_();
    Fiber& fiber = block.current();
    for (auto& group : fiber.groups)
        deliver(group);
    deliver(fiber.open);
    fiber.state = State::kDone;
#ifdef SPEFT_ASAN
    __sanitizer_start_switch_fiber(nullptr, block.main_stack_, block.main_size_);
#endif
    swapcontext(&fiber.context, &block.main_);
}

void Block::switch_to(int next) {
    current_ = next;
    Fiber& fiber = fibers_[size_t(next)];
    threadIdx = {unsigned(next), 0, 0};
#ifdef SPEFT_ASAN
    __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack, kStack);
#endif
    swapcontext(&main_, &fiber.context);
#ifdef SPEFT_ASAN
    __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
}

void Block::pause(State state, int line) {
    Fiber& fiber = current();
    fiber.state = state;
    fiber.line = line;
#ifdef SPEFT_ASAN
    __sanitizer_start_switch_fiber(&fiber.fake_stack, main_stack_, main_size_);
#endif
    swapcontext(&fiber.context, &main_);
#ifdef SPEFT_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_stack_, &main_size_);
#endif
}

void Block::barrier(int line) {
    ++at_barrier_;
    pause(State::kAtBarrier, line);
}

void Block::release_barrier() {
    int line = 0;
    for (Fiber& fiber : fibers_) {
        if (fiber.state != State::kAtBarrier) continue;
        if (line != 0 && fiber.line != line)
            fail("threads of a block wait at different barriers, in lines " + std::to_string(line) +
                 " and " + std::to_string(fiber.line));
        line = fiber.line;
        fiber.state = State::kReady;
    }
    at_barrier_ = 0;
}

const unsigned char* Block::exchange(const void* mine, size_t size, int line) {
    Warp& warp = warps_[size_t(current_ / kLanes)];
    Fiber& fiber = current();
    const int turn = fiber.turn++ % 2;  // a lane may be one operation ahead of the slowest
    if (warp.arrived == 0) warp.line = line;
    if (warp.line != line)
        fail("lanes of a warp are in different operations, in lines " + std::to_string(warp.line) +
             " and " + std::to_string(line));
    std::memcpy(warp.slots[turn][current_ % kLanes], mine, size);
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        const int first = current_ / kLanes * kLanes;
        for (int i = first; i < first + kLanes; ++i)
            if (i != current_) fibers_[size_t(i)].state = State::kReady;
        // This lane, too, may have to let the others go first.
        pause(State::kReady, line);
    } else {
        pause(State::kInWarp, line);
    }
    return warp.slots[turn][0];
}

void Block::run(Index3 block) {
    blockIdx = block;
    t_block = this;
    for (Fiber& fiber : fibers_) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Block::enter, 0);
    }
    // Half of the blocks run in rounds, each ready fiber once, so that threads stay close together;
    // in the others one warp runs as far as it gets before another one does.
    const bool warp_by_warp = random_() % 2 == 1;
    int ahead = -1;  // that warp
    std::vector<int> ready;
    while (alive() > 0) {
        if (at_barrier_ > 0 && at_barrier_ == alive()) release_barrier();
        ready.clear();
        for (size_t i = 0; i < fibers_.size(); ++i)
            if (fibers_[i].state == State::kReady) ready.push_back(int(i));
        if (ready.empty()) {
            std::string lines;
            for (const Fiber& fiber : fibers_)
                if (fiber.state != State::kDone &&
                    lines.find(std::to_string(fiber.line)) == std::string::npos)
                    lines += " " + std::to_string(fiber.line);
            fail("threads wait for others that do not come, in lines" + lines);
        }
        if (!error_.empty()) throw std::runtime_error(error_);
        std::shuffle(ready.begin(), ready.end(), random_);
        if (warp_by_warp) {
            const auto is_ahead = [&](int fiber) { return fiber / kLanes == ahead; };
            if (std::none_of(ready.begin(), ready.end(), is_ahead)) ahead = ready[0] / kLanes;
            ready.erase(std::stable_partition(ready.begin(), ready.end(), is_ahead), ready.end());
        }
        for (int next : ready)
            if (fibers_[size_t(next)].state == State::kReady) switch_to(next);
    }
    t_block = nullptr;
}

}  // namespace

bool run_grid(Index3 grid, int threads, size_t shared_bytes, const std::function<void()>& thread) {
    gridDim = grid;
    blockDim = {unsigned(threads), 1, 1};
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), uint64_t(0));
    std::mt19937_64 random(g_seed);
    std::shuffle(order.begin(), order.end(), random);
    for (uint64_t i : order) {
        Block block(threads, shared_bytes, thread, random());
        try {
            block.run({unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / grid.x / grid.y)});
        } catch (const std::runtime_error& error) {
            t_block = nullptr;
            g_error = error.what();
            return false;
        }
    }
    return true;
}

void set_seed(uint64_t seed) {
    g_seed = seed;
}

const std::string& last_error() {
    return g_error;
}

unsigned char* shared_memory() {
    return t_block->shared();
}

void barrier(int line) {
    t_block->barrier(line);
}

const unsigned char* exchange(const void* mine, size_t size, int line) {
    return t_block->exchange(mine, size, line);
}

int lane() {
    return t_block->current_index() % kLanes;
}

void copy_later(void* to, const void* from, bool valid) {
    t_block->current().open.push_back({to, from, valid});
}

void commit() {
    Fiber& fiber = t_block->current();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void wait(int pending) {
    auto& groups = t_block->current().groups;
    while (int(groups.size()) > pending) {
        deliver(groups.front());
        groups.pop_front();
    }
}

}  // namespace host
}  // namespace cuda
}  // namespace speft
