// The tokens that one of several parts of a sum takes, some at a time.
#pragma once

#include "device.h"

namespace speft {
namespace cuda {

struct TokenPart {
    int64_t begin, end;
    int turns;  // of kStretch tokens, the last of which may be cut off
};

// Part `number` of `parts`, which are whole stretches but for the last token; empty where there are
// fewer stretches than parts.
template <int kStretch>
SPEFT_DEVICE TokenPart part_of_tokens(int64_t tokens, int64_t parts, int64_t number) {
    const int64_t stretches = (tokens + kStretch - 1) / kStretch;
    // In 32 bits, for 64 are divided by a hundred instructions.
    const int64_t size = int64_t(unsigned(stretches + parts - 1) / unsigned(parts)) * kStretch;
    const int64_t begin = number * size;
    const int64_t end = begin + size < tokens ? begin + size : tokens;
    return {begin, end, begin < end ? int((end - begin + kStretch - 1) / kStretch) : 0};
}

}  // namespace cuda
}  // namespace speft
