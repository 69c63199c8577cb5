// One digit of a radix select: how many keys have which, and where the k-th largest lies.
#pragma once

#include "device.h"
#include "salience.h"
#include "scan.h"

namespace speft {
namespace cuda {

constexpr int kThreads = kTileThreads;

// All keys, in three levels.
constexpr int kLevels = 3;
constexpr int kDigitBits = 11;  // of the last digit 10
constexpr int kBins = 1 << kDigitBits;

// Which bits of a key a level looks at.
struct Digit {
    int shift;
    int bins;
    uint32_t known;  // the bits of the levels before

    SPEFT_DEVICE uint32_t of(uint32_t key) const { return (key >> shift) & uint32_t(bins - 1); }
};

SPEFT_DEVICE Digit digit_of(int level) {
    if (level == 0) return {32 - kDigitBits, kBins, 0};
    if (level == 1) return {32 - 2 * kDigitBits, kBins, ~0u << (32 - kDigitBits)};
    return {0, kBins / 2, ~0u << (32 - 2 * kDigitBits)};
}

// What keys are above a bound, in two levels: all below 2^27, of which 2^23 are a power of two of a
// positive score. The last of the high digits stands for whatever is beyond.
constexpr int kLowBits = 14;
constexpr int kLowBins = 1 << kLowBits;
constexpr int kHighBins = 1 << 13;
constexpr uint32_t kBeyond = kHighBins - 1;

SPEFT_DEVICE uint32_t high_digit(uint32_t above) {
    const uint32_t digit = above >> kLowBits;
    return digit < kBeyond ? digit : kBeyond;
}

// Bins follow it in shared memory.
struct alignas(16) Shared {
    SumsOfBlock<kThreads, uint64_t> sums;
    uint64_t found[2];  // what one thread tells all

    SPEFT_DEVICE uint32_t* bins() { return reinterpret_cast<uint32_t*>(this + 1); }
};

constexpr size_t shared_with(int64_t words) {
    return sizeof(Shared) + size_t(words) * sizeof(uint32_t);
}

// Of shared or global memory, aligned for 16 bytes.
template <int kCount>
SPEFT_DEVICE void clear(void* words) {
    static_assert(kCount % (4 * kThreads) == 0, "whole vectors, as many for each thread");
    SPEFT_UNROLL
    for (int i = 0; i < kCount / 4; i += kThreads)
        static_cast<Bytes16*>(words)[i + int(threadIdx.x)] = Bytes16{};
}

struct Pick {
    uint32_t digit;
    uint64_t rank;
};

// The digit of the key of `rank`, from the largest, by how many keys have each digit; and its rank
// among the keys that have it, too. Warps read neighbouring bins, to find the warp whose share has
// it; then all threads part that share. Every thread must come, and pass another barrier before it
// comes again.
template <int kCount, class Count>
SPEFT_DEVICE Pick pick(const Count* bins, uint64_t rank, Shared& shared) {
    constexpr int kShare = kCount / (kThreads / kWarp), kEach = (kShare + kThreads - 1) / kThreads;
    static_assert(kShare % kWarp == 0 && kShare % kEach == 0, "whole reads");
    const Count* const top = bins + kCount - 1;
    const int share = warp_id() * kShare;
    uint64_t mine = 0, total;
    SPEFT_UNROLL
    for (int i = 0; i < kShare; i += kWarp)
        mine += top[-(share + i + lane_id())];
    const uint64_t before = sum_before<kThreads>(mine, shared.sums, &total);
    const uint64_t above_share = exchange_from(before, 0);
    const uint64_t with_share = exchange_from(before + mine, kWarp - 1);
    if (lane_id() == 0 && above_share < rank && rank <= with_share) {
        shared.found[0] = uint64_t(share);
        shared.found[1] = rank - above_share;
    }
    sync_block();  // one warp's share has it
    const int first = int(threadIdx.x) * kEach;
    int digit = kCount - 1 - (int(shared.found[0]) + first);
    rank = shared.found[1];
    mine = 0;
    if (first < kShare)
        for (int i = 0; i < kEach; ++i)
            mine += bins[digit - i];
    uint64_t above = sum_before<kThreads>(mine, shared.sums, &total);
    if (above < rank && rank <= above + mine) {
        for (; above + bins[digit] < rank; --digit)
            above += bins[digit];
        shared.found[0] = uint64_t(digit);
        shared.found[1] = rank - above;
    }
    sync_block();  // one thread has found it
    return {uint32_t(shared.found[0]), shared.found[1]};
}

}  // namespace cuda
}  // namespace speft
