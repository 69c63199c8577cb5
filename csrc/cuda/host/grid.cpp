// Grids: which block runs when.
#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "device.h"
#include "fibers.h"
#include "races.h"

namespace speft {
namespace cuda {
namespace host {
namespace {

// Threads that are kept from grid to grid under the thread sanitizer, which takes a megabyte each.
// Blocks beyond them may come to the numbers of threads that have ended: to it they are the same.
constexpr size_t kKept = 2100;

uint64_t g_seed = 0;
std::string g_error;

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

}  // namespace host
}  // namespace cuda
}  // namespace speft
