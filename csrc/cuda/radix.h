// One digit of a radix select: how many keys have which, and where the k-th largest lies.
#pragma once

#include "device.h"
#include "salience.h"
#include "scan.h"

namespace speft {
namespace cuda {

constexpr int kThreads = kTileThreads;
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

struct Shared {
    union {
        SumsOfBlock<kThreads, uint64_t> sums;
        SumsOfBlock<kThreads, uint32_t> short_sums;
    };
    uint64_t found[2];  // what one thread tells all
    uint32_t bins[kBins];
};

struct Pick {
    uint32_t digit;
    uint64_t rank;
};

// The digit of the key of `rank`, from the largest, by how many keys have each digit; and its rank
// among the keys that have it, too. Every thread must come, and pass another barrier before it
// comes again.
template <class Count>
SPEFT_DEVICE Pick pick(const Count* bins, int count, uint64_t rank, Shared& shared) {
    constexpr int kEach = kBins / kThreads;
    const int top = count - 1 - int(threadIdx.x) * kEach;
    uint64_t mine = 0, total;
    for (int i = 0; i < kEach; ++i)
        if (top - i >= 0) mine += bins[top - i];
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
