// Sums over tokens by several threads, with a result that does not depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace speft {

// The tokens are cut into splits that depend on the problem alone. Each split is summed by one
// thread into a buffer of its own, and the buffers are added in order: the threads meet once a
// call. All buffers together have at most kSplitBytes, and fewer elements than the columns of the
// weight that the entries lie in (`dense`): no scratch is ever as large as the dense gradient.
constexpr int64_t kSplitBytes = 8 << 20;

template <class Acc>
int64_t token_splits(int64_t blocks, int64_t most, int64_t entries, int64_t dense) {
    const int64_t room = std::min(kSplitBytes / int64_t(sizeof(Acc)), dense - 1);
    return std::max<int64_t>(1, std::min({blocks, most, room / std::max<int64_t>(entries, 1)}));
}

constexpr int64_t kManySplits = 32;
constexpr int64_t kFewSplits = 4;

// out[e] = (accumulate ? out[e] : 0) + the sum over all blocks of tokens, for `entries` entries.
// Where the room is for few splits the work on one block of tokens is large as well; then the team
// shares each block, and meets twice a block.
//
// `make_panels()` allocates what one team needs. `add_block(worker, panels, first, count, sums)`
// adds the tokens [first, first + count) to sums[entries]; it shares its work among the
// worker's team, which may be that worker alone.
template <class Acc, class MakePanels, class AddBlock>
void sum_over_tokens(int64_t tokens, int64_t block, int64_t entries, int64_t dense, Acc* out,
                     bool accumulate, int threads, MakePanels&& make_panels, AddBlock&& add_block) {
    if (!accumulate) std::fill(out, out + entries, Acc(0));
    if (entries == 0 || tokens == 0) return;
    const int64_t blocks = (tokens + block - 1) / block;
    const auto add = [&](Worker worker, auto& panels, Range range, Acc* sums) {
        for (int64_t b = range.begin; b < range.end; ++b)
            add_block(worker, panels, b * block, std::min(block, tokens - b * block), sums);
    };

    const int64_t splits = token_splits<Acc>(blocks, kManySplits, entries, dense);
    if (splits < kFewSplits) {
        auto panels = make_panels();
        parallel(threads, [&](Worker worker) { add(worker, panels, {0, blocks}, out); });
        return;
    }
    threads = int(std::min<int64_t>(threads, splits));
    std::vector<decltype(make_panels())> panels;
    for (int i = 0; i < threads; ++i)
        panels.push_back(make_panels());
    auto sums = scratch<Acc>(splits * entries);
    parallel(threads, [&](Worker worker) {
        const Range mine = worker.share(splits);
        for (int64_t s = mine.begin; s < mine.end; ++s) {
            Acc* own = sums.get() + s * entries;
            std::fill(own, own + entries, Acc(0));
            add(Worker{0, 1}, panels[worker.index], share(blocks, s, splits), own);
        }
        worker.barrier();
        const Range range = worker.share(entries, kVectorBytes / int64_t(sizeof(Acc)));
        for (int64_t s = 0; s < splits; ++s)
            for (int64_t e = range.begin; e < range.end; ++e)
                out[e] += sums[s * entries + e];
    });
}

}  // namespace speft
