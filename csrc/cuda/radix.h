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

// What keys are above a bound, in two levels: all below 2^27, which is scores of up to 2^16 times
// the bound's. The last of the high digits stands for whatever is beyond.
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
    union {
        SumsOfBlock<kThreads, uint64_t> sums;
        SumsOfBlock<kThreads, uint32_t> short_sums;
    };
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
// among the keys that have it, too. Every thread must come, and pass another barrier before it
// comes again.
template <int kCount, class Count>
SPEFT_DEVICE Pick pick(const Count* bins, uint64_t rank, Shared& shared) {
    static_assert(kCount % kThreads == 0, "as many for each thread");
    constexpr int kEach = kCount / kThreads;
    const int top = kCount - 1 - int(threadIdx.x) * kEach;
    uint64_t mine = 0, total;
    SPEFT_UNROLL
    for (int i = 0; i < kEach; ++i)
        mine += bins[top - i];
    uint64_t above = sum_before<kThreads>(mine, shared.sums, &total);
    if (above < rank && rank <= above + mine) {
        int digit = top;
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
