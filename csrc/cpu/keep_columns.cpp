// keep_columns: kept[b, c, t] = x[b * width + t, columns[c]], zero where there is no such token:
// the activations that a backward pass will read, in the form in which sampled_grad reads them.
//
// Count (M tokens, C columns): reads 4 M C bytes of float32, at worst whole 64-byte lines of them,
// and writes 4 M C.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "panel.h"
#include "parallel.h"

namespace speft {

void keep_columns(const void* x, int64_t x_stride, int64_t in_features, int64_t tokens,
                  const int32_t* columns, int64_t num_columns, int64_t width, void* kept,
                  DType dtype, int threads) {
    const int64_t blocks = (tokens + width - 1) / width;
    threads = threads_for(kWorkOfPacking * tokens * num_columns, kPanelWorkPerThread, threads);
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel(threads, [&](Worker worker) {
            const Range mine = worker.share(blocks);
            for (int64_t b = mine.begin; b < mine.end; ++b) {
                const Tokens<T> some{static_cast<const T*>(x) + b * width * x_stride, x_stride,
                                     in_features,
                                     int(std::min<int64_t>(width, tokens - b * width))};
                pack_panel(some, columns, num_columns, int(width),
                           static_cast<T*>(kept) + b * num_columns * width);
            }
        });
    });
}

}  // namespace speft
