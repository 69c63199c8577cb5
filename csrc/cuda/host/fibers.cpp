#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

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

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;
// Threads that are kept from grid to grid under the thread sanitizer, which takes a megabyte each.
// Blocks beyond them may come to the numbers of threads that have ended: to it they are the same.
constexpr size_t kKept = 2100;
constexpr int kLanes = 32;

uint64_t g_seed = 0;
std::string g_error;

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
    unsigned barriers_ = 0;  // that all have passed
    char passed_[2] = {};    // what orders threads at even ones and at odd ones
    unsigned of_grid_ = 0;   // barriers of the grid that all have passed
    char started_ = 0;       // and at the block's start
    char ended_ = 0;         // and its end
    void* const watched_ = races::current();
    std::string error_;
};

thread_local Block* t_block = nullptr;
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

void Block::barrier(int line) {
    // A thread may come to the next barrier before another one has left this one.
    char* const passed = &passed_[barriers_ % 2];
    races::release(passed);
    ++waiting_;
    pause(State::kAtBarrier, line);
    races::acquire(passed);
}

void Block::barrier_of_grid(int line) {
    char* const passed = &g_passed[of_grid_ % 2];
    races::release(passed);
    ++waiting_;
    pause(State::kAtGrid, line);
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
    t_block = this;
    if (!begun_) start();
    std::vector<int> ready;
    for (int left = alive(); left > 0; left = alive()) {
        if (waiting_ == left && count(State::kAtGrid) == left) {
            t_block = nullptr;
            return false;
        }
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
    t_block = nullptr;
    return true;
}

// What orders the start of a grid, and its end.
char g_begun, g_ended;

// A block, and the thread that makes, runs and ends it as the thread sanitizer sees it: nothing
// orders two blocks of a grid. The next grid comes after all of them, and its blocks have the first
// ones' threads again.
class Running {
  public:
    Running(Index3 at, size_t place, int threads, size_t shared_bytes,
            const std::function<void()>& thread, uint64_t seed)
        : at_(at) {
        thread_local Places kept;
        const bool keeps = !races::kWatched || place + size_t(threads) + 1 <= kKept;
        Places& places = keeps ? kept : own_;
        if (!keeps) place = 0;
        watched_ = places.at(place).watched();
        as_itself([&] {
            races::acquire(&g_begun);
            block_ =
                std::make_unique<Block>(threads, shared_bytes, thread, seed, places, place + 1);
        });
    }
    ~Running() {
        as_itself([&] { block_.reset(); });
    }

    // Runs it to its end or to a barrier of the grid.
    void go_on() {
        as_itself([&] {
            // What is thrown must not pass a switch of threads.
            try {
                ended_ = block_->run(at_);
            } catch (const std::runtime_error& error) {
                t_block = nullptr;
                g_error = error.what();
            }
            if (ended_) races::release(&g_ended);
        });
    }
    void leave_barrier_of_grid() {
        as_itself([&] { block_->leave_barrier_of_grid(); });
    }
    bool ended() const { return ended_; }

  private:
    template <class F>
    void as_itself(F&& f) {
        void* const before = races::current();
        races::switch_to(watched_);
        f();
        races::switch_to(before);
    }

    Index3 at_;
    Places own_;
    void* watched_;
    std::unique_ptr<Block> block_;  // not on a stack, where the next one would have its barriers
    bool ended_ = false;
};

// Runs blocks from one barrier of the grid to the next.
bool run_together(std::deque<Running>& blocks, bool resident, std::mt19937_64& random) {
    std::vector<Running*> left;
    for (Running& block : blocks)
        left.push_back(&block);
    while (true) {
        std::shuffle(left.begin(), left.end(), random);
        for (Running* block : left) {
            block->go_on();
            if (!g_error.empty()) return false;
        }
        const auto ended = [](const Running* block) { return block->ended(); };
        if (std::all_of(left.begin(), left.end(), ended)) return true;
        if (!resident) g_error = "blocks that need not be there together wait for each other";
        if (std::any_of(left.begin(), left.end(), ended))
            g_error = "blocks wait at a barrier of the grid that others never reach";
        if (!g_error.empty()) return false;
        for (Running* block : left)
            block->leave_barrier_of_grid();
    }
}

}  // namespace

bool run_grid(Index3 grid, int threads, size_t shared_bytes, bool resident,
              const std::function<void()>& thread) {
    gridDim = grid;
    blockDim = {unsigned(threads), 1, 1};
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), uint64_t(0));
    std::mt19937_64 random(g_seed);
    std::shuffle(order.begin(), order.end(), random);
    races::release(&g_begun);
    g_error.clear();
    std::deque<Running> blocks;
    for (uint64_t i = 0; i < count; ++i) {
        const auto at = order[i];
        const size_t place = races::kWatched || resident ? i * (size_t(threads) + 1) : 0;
        blocks.emplace_back(Index3{unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                                   unsigned(at / grid.x / grid.y)},
                            place, threads, shared_bytes, thread, random());
        if (resident && i + 1 < count) continue;
        if (!run_together(blocks, resident, random)) return false;
        blocks.clear();
    }
    races::acquire(&g_ended);
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
