// Tiles of matrices on their way to shared memory, 16 bytes at a time where they may be.
#pragma once

#include "device.h"

namespace speft {
namespace cuda {

// Some neighbouring columns of a matrix: `count` of a tile's columns are real.
template <class Element>
struct Columns {
    const Element* first;  // of row 0
    int64_t stride;
    int count;
    bool vectors;  // every 16 bytes are aligned, and whole
};

// Whether 16 bytes at a time may be read of every row of a matrix, from columns that are a multiple
// of `size` apart.
template <class Element>
bool in_vectors(const void* first, int64_t stride, int64_t size) {
    constexpr int kVector = 16 / sizeof(Element);
    return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride % kVector == 0 &&
           size % kVector == 0;
}

// Brings rows [start, start + kRows) of a tile's columns, kPitch elements apart, with all kThreads
// threads of the block; zeros beyond `end` and beyond the real columns. Asynchronous where the
// columns come in vectors: the caller commits and waits. Else each thread copies kAtOnce elements
// at a time, as many as the caller has registers for.
template <int kRows, int kWidth, int kPitch, int kThreads, int kAtOnce, class Element>
SPEFT_DEVICE void bring(Element* to, const Columns<Element>& from, int64_t start, int64_t end) {
    if (from.vectors) {
        constexpr int kVector = 16 / sizeof(Element), kRowVectors = kWidth / kVector;
        for (int i = int(threadIdx.x); i < kRows * kRowVectors; i += kThreads) {
            const int row = i / kRowVectors, column = i % kRowVectors * kVector;
            const bool valid = start + row < end && column < from.count;
            // Where nothing is to be read, an address that may be.
            const int64_t at = valid ? (start + row) * from.stride + column : 0;
            cp_async16(to + row * kPitch + column, from.first + at, valid);
        }
    } else {
        SPEFT_UNROLL_BY(kAtOnce)
        for (int i = int(threadIdx.x); i < kRows * kWidth; i += kThreads) {
            const int row = i / kWidth, column = i % kWidth;
            const bool valid = start + row < end && column < from.count;
            to[row * kPitch + column] =
                valid ? from.first[(start + row) * from.stride + column] : Element(0);
        }
    }
}

}  // namespace cuda
}  // namespace speft
