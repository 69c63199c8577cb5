// Whose turn it is, and what is wrong with an address.
#include <algorithm>
#include <climits>
#include <memory>
#include <numeric>
#include <random>

#include "ptx.h"

namespace ptx {

std::string hex(uint64_t number) {
    char text[32];
    snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(number));
    return text;
}

// Two accesses of shared memory by different warps, one of which writes, need a barrier between
// them, unless both are atomic. It is an error in any order: the order that is run need not be the
// one in which it goes wrong.
uint8_t* Block::shared_at(int warp, uint32_t address, size_t bytes, Use use) {
    const size_t offset = size_t(address) - kSharedStart;
    if (address < kSharedStart || offset + bytes > shared.size())
        throw Error("beyond shared memory: " + hex(address));
    const uint32_t me = 1u << warp;
    for (size_t at = offset; at < offset + bytes; ++at) {
        Access& last = accesses[at];
        if (last.epoch != epoch) last = {epoch, 0, 0, true};
        last.atomic &= use == kAtomic;
        const uint32_t others = (last.writers | (use == kRead ? 0 : last.readers)) & ~me;
        if (others != 0 && !last.atomic)
            throw Error("a race with warps " + hex(others) + " in shared memory at " +
                        hex(address));
        (use == kRead ? last.readers : last.writers) |= me;
    }
    return shared.data() + offset;
}

// The address sanitizer, which is preloaded, knows the bounds of torch's and Python's memory.
extern "C" void* __asan_region_is_poisoned(void* start, size_t bytes) __attribute__((weak));

uint8_t* global_at(uint64_t address, size_t bytes) {
    if (&__asan_region_is_poisoned == nullptr) throw Error("libasan is not preloaded");
    uint8_t* const at = reinterpret_cast<uint8_t*>(address);
    if (__asan_region_is_poisoned(at, bytes) != nullptr)
        throw Error("beyond an allocation: " + hex(address));
    return at;
}

namespace {

using Random = std::mt19937_64;

std::unique_ptr<Block> start(const Kernel& kernel, const Launch& launch, uint32_t number,
                             Random& random) {
    auto block = std::make_unique<Block>();
    block->kernel = &kernel;
    block->launch = &launch;
    block->number = number;
    block->shared.resize(launch.shared_bytes);
    for (uint8_t& byte : block->shared)
        byte = uint8_t(random());
    block->accesses.resize(launch.shared_bytes);
    const auto [width, height, depth] = launch.grid;
    const uint64_t workspace =
        launch.cooperative ? reinterpret_cast<uint64_t>(launch.workspace) : 0;
    const uint32_t x = number % width, y = number / width % height, z = number / width / height;
    block->warps.resize(launch.threads / kLanes);
    for (size_t i = 0; i < block->warps.size(); ++i) {
        Warp& warp = block->warps[i];
        warp.block = block.get();
        warp.index = int(i);
        warp.registers.assign(size_t(kernel.registers) * kLanes, 0xdeadbeefcafef00d);
        for (const auto& [value, row] : kernel.constants)
            std::fill_n(warp.row(row), kLanes, value);
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
            const uint32_t special[std::size(kSpecial)] = {uint32_t(i) * kLanes + lane,
                                                           0,
                                                           0,
                                                           x,
                                                           y,
                                                           z,
                                                           launch.threads,
                                                           width,
                                                           height,
                                                           depth,
                                                           lane,
                                                           uint32_t(workspace >> 32),
                                                           uint32_t(workspace)};
            for (size_t row = 0; row < std::size(special); ++row)
                warp.row(int(row))[lane] = special[row];
            warp.copies[lane].emplace_back();
        }
    }
    return block;
}

void leave(Warp& warp, Lanes lanes) {
    each(lanes, [&](int lane) {
        for (const auto& group : warp.copies[lane])
            if (!group.empty()) throw Error("returns before its copies have arrived");
    });
    warp.live &= ~lanes;
    warp.block->finished += warp.live == 0;
}

void arrive(Warp& warp) {
    Block& block = *warp.block;
    warp.waiting = true;
    if (++block.waiting < block.warps.size()) return;
    block.waiting = 0;
    ++block.epoch;
    for (Warp& other : block.warps)
        other.waiting = false;
}

// Runs a warp for so many instructions, or until it waits, asks for others or has returned.
void advance(Warp& warp, uint64_t turns) {
    for (; turns > 0 && warp.live != 0 && !warp.waiting; --turns) {
        const Lanes ready = warp.live & ~warp.held, some = ready != 0 ? ready : warp.held;
        int next = INT_MAX;
        each(some, [&](int lane) { next = std::min(next, warp.next[lane]); });
        const Instruction& at = warp.block->kernel->code[next];
        warp.at = &at;
        Lanes taken = 0;
        each(some, [&](int lane) {
            if (warp.next[lane] != next) return;
            if (at.guard < 0 || as<bool>(warp.row(at.guard)[lane]) != at.negated)
                taken |= Lanes(1) << lane;
            else
                ++warp.next[lane];
        });
        if (at.collective) {
            warp.held |= taken;
            if (ready != 0) continue;
            if (taken != (at.flow == Instruction::kBarrier ? warp.live : ~Lanes(0)))
                throw Error("lanes " + hex(~taken) + " are elsewhere");
            warp.held = 0;
        }
        each(taken, [&](int lane) {
            warp.next[lane] = at.flow == Instruction::kBranch ? at.target : next + 1;
        });
        if (at.flow == Instruction::kPlain && taken != 0) at.execute(warp, at, taken);
        if (at.flow == Instruction::kReturn) leave(warp, taken);
        if (at.flow == Instruction::kBarrier) arrive(warp);
        if (at.polls) return;
    }
}

}  // namespace

void run(const Kernel& kernel, const Launch& launch, uint64_t seed) {
    if (launch.threads % kLanes != 0 || int(launch.threads) > kernel.most_threads)
        throw Error(kernel.name + ": so many threads: " + std::to_string(launch.threads));
    Random random(seed);
    std::vector<uint32_t> order(launch.grid[0] * launch.grid[1] * launch.grid[2]);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    // All warps by turns, or one as far as it gets.
    const size_t most_blocks = launch.cooperative ? order.size() : 1 + random() % 4;
    const uint64_t most_turns = std::vector<uint64_t>{3, 40, 400, 1 << 30}[random() % 4];
    std::vector<std::unique_ptr<Block>> blocks;
    Warp* warp = nullptr;
    try {
        while (!order.empty() || !blocks.empty()) {
            for (; blocks.size() < most_blocks && !order.empty(); order.pop_back())
                blocks.push_back(start(kernel, launch, order.back(), random));
            std::vector<Warp*> ready;
            for (const auto& block : blocks)
                for (Warp& other : block->warps)
                    if (other.live != 0 && !other.waiting) ready.push_back(&other);
            if (ready.empty()) throw Error("warps wait at a barrier that others never reach");
            // As many turns as there are warps: finding who is ready costs more than one.
            for (size_t i = ready.size(); i > 0; --i) {
                warp = ready[random() % ready.size()];
                advance(*warp, 1 + random() % most_turns);
            }
            blocks.erase(std::remove_if(blocks.begin(), blocks.end(),
                                        [](const std::unique_ptr<Block>& block) {
                                            return block->finished == block->warps.size();
                                        }),
                         blocks.end());
        }
    } catch (const Error& error) {
        std::string where = kernel.name;
        if (warp != nullptr && warp->at != nullptr)
            where += ": block " + std::to_string(warp->block->number) + " warp " +
                     std::to_string(warp->index) + " line " + std::to_string(warp->at->line) +
                     " `" + warp->at->text + "`";
        throw Error(where + ": " + error.what());
    }
}

}  // namespace ptx
