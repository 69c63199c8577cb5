// Tiles of matrices on their way to shared memory, 16 bytes at a time where they may be.
#pragma once

#include "device.h"

namespace speft {
namespace cuda {

// Whether Chunks may read a matrix whose tiles start `size` columns, or a multiple of that, apart.
template <class Element>
bool in_vectors(const void* first, int64_t stride, int64_t size) {
    constexpr int kVector = 16 / sizeof(Element);
    return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride % kVector == 0 &&
           size % kVector == 0 && stride < (1 << 24);
}

// Where a thread's 16 bytes at a time lie in a matrix, the same in each of its tiles. Kept in
// registers, because a loop that finds them anew has more instructions for them than for the
// products of a tile.
template <int kRows, int kWidth, int kPitch, int kThreads, class Element>
class Chunks {
    static constexpr int kVector = 16 / sizeof(Element), kAcross = kWidth / kVector;
    static constexpr int kStep = kThreads / kAcross, kEach = kRows / kStep;
    static_assert(kThreads % kAcross == 0 && kRows % kStep == 0, "each thread brings as many");
    static_assert(kRows <= 128, "offsets fit 32 bits");

  public:
    // Of tiles of which so many rows and columns are wanted. The others bring what is there, of
    // the last row and the first columns, for sums that no one reads.
    SPEFT_DEVICE Chunks(int64_t stride, int rows, int columns)
        : row_(int(threadIdx.x) / kAcross), column_(int(threadIdx.x) % kAcross * kVector) {
        SPEFT_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int row = row_ + i * kStep;
            offsets_[i] =
                (row < rows ? row : rows - 1) * int(stride) + (column_ < columns ? column_ : 0);
        }
    }

    // Brings the tile at `from`, with zeros from this column on; the caller commits and waits.
    SPEFT_DEVICE void bring_columns(Element* to, const Element* from, int columns) const {
        SPEFT_UNROLL
        for (int i = 0; i < kEach; ++i)
            cp_async16(place(to, i), from + offsets_[i], column_ < columns);
    }

    // Likewise with zeros from this row on.
    SPEFT_DEVICE void bring_rows(Element* to, const Element* from, int64_t rows) const {
        SPEFT_UNROLL
        for (int i = 0; i < kEach; ++i)
            cp_async16(place(to, i), from + offsets_[i], row_ + i * kStep < rows);
    }

  private:
    SPEFT_DEVICE Element* place(Element* to, int i) const {
        return to + row_ * kPitch + column_ + i * kStep * kPitch;
    }

    int row_, column_;
    int offsets_[kEach];
};

// Brings a tile that is not in vectors, with zeros from this row and this column on, at once and
// with all kThreads threads of the block; an element after the other, because the products' sums
// leave no registers for several.
template <int kRows, int kWidth, int kPitch, int kThreads, class Element>
SPEFT_DEVICE void bring_singly(Element* to, const Element* from, int64_t stride, int64_t rows,
                               int64_t columns) {
    SPEFT_UNROLL_BY(1)
    for (int i = int(threadIdx.x); i < kRows * kWidth; i += kThreads) {
        const int row = i / kWidth, column = i % kWidth;
        const bool real = row < rows && column < columns;
        to[row * kPitch + column] = real ? from[row * stride + column] : Element(0);
    }
}

}  // namespace cuda
}  // namespace speft
