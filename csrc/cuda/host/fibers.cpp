#include "fibers.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "block.h"
#include "device.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
    #include <sanitizer/common_interface_defs.h>
    #define SPEFT_ASAN 1
#endif

namespace speft {
namespace cuda {

thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {
namespace {

thread_local Block* t_block = nullptr;  // that runs, as long as a Current is there
struct Current {
    explicit Current(Block* block) { t_block = block; }
    ~Current() { t_block = nullptr; }
};

char g_passed[2] = {};  // what orders the threads of a grid at even and odd barriers of it

void deliver(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        if (copy.valid) races::read(copy.from, 16);
        races::written(copy.to, 16);
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    copies.clear();
}

}  // namespace

void Block::enter() {
    Block& block = *t_block;
#ifdef SPEFT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_size_);
#endif
    races::acquire(&block.started_);
    block.thread_();
    Fiber& fiber = block.current();
    for (auto& group : fiber.groups)
        deliver(group);
    deliver(fiber.open);
    fiber.state = State::kDone;
    races::release(&block.ended_);
    races::switch_to(block.watched_);
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
    races::switch_to(fiber.watched);
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
    races::switch_to(watched_);
    swapcontext(&fiber.context, &main_);
#ifdef SPEFT_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_stack_, &main_size_);
#endif
}

// A thread may come to the next barrier before another one has left this one: so there are two of
// what orders them.
void Block::barrier(int line) {
    wait(State::kAtBarrier, &passed_[barriers_ % 2], line);
}

void Block::barrier_of_grid(int line) {
    wait(State::kAtGrid, &g_passed[of_grid_ % 2], line);
}

void Block::wait(State state, char* passed, int line) {
    races::release(passed);
    ++waiting_;
    pause(state, line);
    races::acquire(passed);
}

void Block::note_copy(const void* to) {
    auto& groups = warps_[size_t(current_ / kLanes)].copies;
    const Fiber& fiber = current();
    if (fiber.committed >= groups.size()) groups.resize(fiber.committed + 1);
    auto& copies = groups[fiber.committed];
    const size_t which = fiber.open.size();
    if (which >= copies.size()) copies.resize(which + 1);
    copies[which][size_t(current_ % kLanes)] = reinterpret_cast<uint64_t>(to);
}

void Block::release(State state) {
    int line = 0;
    for (Fiber& fiber : fibers_) {
        if (fiber.state != state) continue;
        if (line != 0 && fiber.line != line)
            fail("threads of a block wait at different barriers, in lines " + std::to_string(line) +
                 " and " + std::to_string(fiber.line));
        line = fiber.line;
        fiber.state = State::kReady;
    }
    waiting_ = 0;
    ++(state == State::kAtGrid ? of_grid_ : barriers_);
}

const unsigned char* Block::exchange(const void* mine, size_t size, int line) {
    Warp& warp = warps_[size_t(current_ / kLanes)];
    Fiber& fiber = current();
    const int turn = fiber.turn++ % 2;  // a lane may be one operation ahead of the slowest
    if (warp.arrived == 0) warp.line = line;
    if (warp.line != line)
        fail("lanes of a warp are in different operations, in lines " + std::to_string(warp.line) +
             " and " + std::to_string(line));
    // Not memcpy, which the thread sanitizer would see.
    std::copy_n(static_cast<const volatile unsigned char*>(mine), size,
                warp.slots[turn][current_ % kLanes]);
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

void Block::start() {
    races::release(&started_);
    for (Fiber& fiber : fibers_) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Block::enter, 0);
    }
    begun_ = true;
}

bool Block::run(Index3 block) {
    blockIdx = block;
    const Current current(this);
    if (!begun_) start();
    std::vector<int> ready;
    for (int left = alive(); left > 0; left = alive()) {
        if (waiting_ == left && count(State::kAtGrid) == left) return false;
        if (waiting_ == left && count(State::kAtBarrier) == left) release(State::kAtBarrier);
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
        if (warp_by_warp_) {
            const auto is_ahead = [&](int fiber) { return fiber / kLanes == ahead_; };
            if (std::none_of(ready.begin(), ready.end(), is_ahead)) ahead_ = ready[0] / kLanes;
            ready.erase(std::stable_partition(ready.begin(), ready.end(), is_ahead), ready.end());
        }
        for (int next : ready)
            if (fibers_[size_t(next)].state == State::kReady) switch_to(next);
    }
    if (!error_.empty()) throw std::runtime_error(error_);  // of the last round
    races::acquire(&ended_);
    for (const Warp& warp : warps_)
        for (const auto& group : warp.copies)
            for (const auto& addresses : group)
                count_copy(reinterpret_cast<const unsigned char*>(addresses.data()),
                           sizeof(uint64_t));
    return true;
}

unsigned char* shared_memory() {
    return t_block->shared();
}

void barrier(int line) {
    t_block->barrier(line);
}

void barrier_of_grid(int line) {
    t_block->barrier_of_grid(line);
}

const unsigned char* exchange(const void* mine, size_t size, int line) {
    return t_block->exchange(mine, size, line);
}

int lane() {
    return t_block->current_index() % kLanes;
}

void expect_aligned(const void* at, int line) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0)
        t_block->fail("16 bytes at an address that is no multiple of 16, in line " +
                      std::to_string(line));
}

void at_atomic(void* at) {
    Fiber& fiber = t_block->current();
    if (fiber.fenced) races::release(at);
    fiber.touched = at;
}

void fence() {
    Fiber& fiber = t_block->current();
    if (fiber.touched != nullptr) races::acquire(fiber.touched);
    fiber.fenced = true;
}

void copy_later(void* to, const void* from, bool valid) {
    t_block->note_copy(to);
    races::written(to, 16);  // from now on, at any time until it is waited for
    t_block->current().open.push_back({to, from, valid});
}

void commit() {
    Fiber& fiber = t_block->current();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
    ++fiber.committed;
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
