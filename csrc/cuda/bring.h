// Tiles of matrices on their way to shared memory, 16 bytes at a time where they may be.
#pragma once

#include "device.h"

namespace speft {
namespace cuda {

// Where an element of a tile stands in shared memory, kWidth of them a row.
template <int kWidth>
struct Plain {
    static constexpr int kColumns = kWidth, kPeriod = 1;
    SPEFT_DEVICE static int at(int row, int column) { return row * kWidth + column; }
};

// Of 16-bit numbers, for ldmatrix: the 16-byte chunks of a row are exchanged by its number, so that
// eight rows at one column, and eight chunks beside each other, lie in all banks. In exchange for
// an exclusive or it takes no bytes beside the tile, which would spoil the copies' way in.
template <int kWidth>
struct Swizzled {
    static constexpr int kColumns = kWidth, kChunks = kWidth / 8;
    static constexpr int kOfBanks = kChunks < 8 ? 8 / kChunks : 1;  // rows that fill all banks
    static constexpr int kTurns = kChunks < 8 ? kChunks : 8;
    static constexpr int kPeriod = kOfBanks * kTurns;  // rows after which it is the same again
    SPEFT_DEVICE static int at(int row, int column) {
        return row * kWidth + ((column / 8) ^ (row / kOfBanks % kTurns)) * 8 + column % 8;
    }
};

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
template <int kRows, class Layout, int kThreads, class Element>
class Chunks {
    static constexpr int kVector = 16 / sizeof(Element), kAcross = Layout::kColumns / kVector;
    static constexpr int kStep = kThreads / kAcross, kEach = kRows / kStep;
    static_assert(kStep % Layout::kPeriod == 0, "a thread's chunks are in one column as laid out");
    static_assert(kThreads % kAcross == 0 && kRows % kStep == 0, "each thread brings as many");
    static_assert(kRows <= 256, "offsets fit 32 bits");

  public:
    // Of tiles of which so many rows and columns are wanted. The others bring what is there, of
    // the last row and the first columns, for sums that no one reads.
    SPEFT_DEVICE Chunks(int64_t stride, int rows, int columns)
        : row_(int(threadIdx.x) / kAcross),
          column_(int(threadIdx.x) % kAcross * kVector),
          place_(Layout::at(row_, column_)) {
        SPEFT_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int row = row_ + i * kStep;
            offsets_[i] = unsigned(row < rows ? row : rows - 1) * unsigned(stride) +
                          unsigned(column_ < columns ? column_ : 0);
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
        return to + place_ + i * kStep * Layout::kColumns;
    }

    int row_, column_, place_;
    unsigned offsets_[kEach];
};

// Brings a tile that is not in vectors, with zeros from this row and this column on, at once and
// with all kThreads threads of the block; an element after the other, because the products' sums
// leave no registers for several.
template <int kRows, class Layout, int kThreads, class Element>
SPEFT_DEVICE void bring_singly(Element* to, const Element* from, int64_t stride, int64_t rows,
                               int64_t columns) {
    constexpr int kWidth = Layout::kColumns;
    SPEFT_UNROLL_BY(1)
    for (int i = int(threadIdx.x); i < kRows * kWidth; i += kThreads) {
        const int row = i / kWidth, column = i % kWidth;
        const bool real = row < rows && column < columns;
        to[Layout::at(row, column)] = real ? from[row * stride + column] : Element(0);
    }
}

}  // namespace cuda
}  // namespace speft
