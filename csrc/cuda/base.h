// The weight under a sparse delta, in its four forms, eight neighbouring columns at a time.
#pragma once

#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace speft {
namespace cuda {

constexpr int kChunk = 8;  // columns of 16 bytes of 16-bit numbers

// What W is stored as. A word of four bits holds a column of each quarter of the matrix, so its
// columns are parted in four, and tiles of columns lie within one part.
template <Base kBase>
struct Stored {
    using Element = uint16_t;
    static constexpr int kParts = kBase == Base::kInt4 ? 4 : 1;
    static constexpr bool kQuantized = false;
};
template <>
struct Stored<Base::kInt8> {
    using Element = uint8_t;
    static constexpr int kParts = 1;
    static constexpr bool kQuantized = true;
};
template <>
struct Stored<Base::kInt4> {
    using Element = uint16_t;
    static constexpr int kParts = 4;
    static constexpr bool kQuantized = true;
};

// Neighbouring elements of a row.
template <class Element, int kCount = kChunk>
struct Some {
    Element elements[kCount];
};

// kCount aligned elements in one load, or zeros.
template <int kCount, class Element>
SPEFT_DEVICE Some<Element, kCount> load(const Element* from, bool real) {
    constexpr int kEach = 4 / sizeof(Element);  // elements of a register
    using Bytes = std::conditional_t<kCount * sizeof(Element) == 16, Bytes16, Bytes8>;
    static_assert(sizeof(Bytes) == kCount * sizeof(Element), "one load");
    Bytes bytes = {};
    if (real) bytes = *reinterpret_cast<const Bytes*>(from);
    Some<Element, kCount> found;
    SPEFT_UNROLL
    for (int i = 0; i < kCount; ++i)
        found.elements[i] =
            Element(bytes.words[i / kEach] >> (8 * int(sizeof(Element)) * (i % kEach)));
    return found;
}

SPEFT_DEVICE uint32_t pair_of(uint16_t low, uint16_t high) {
    return uint32_t(low) | uint32_t(high) << 16;
}

// The group that columns around `column` share a scale with. In 32 bits, because 64 are divided by
// a hundred instructions.
SPEFT_DEVICE int group_of(const DeltaProduct& product, int64_t column) {
    return int(uint32_t(column) / uint32_t(product.group));
}

template <class T>
SPEFT_DEVICE float scale_at(const DeltaProduct& product, int64_t row, int group) {
    const int64_t at = row * product.groups + group;
    return product.wide_scales ? static_cast<const float*>(product.scales)[at]
                               : widen(static_cast<const T*>(product.scales)[at]);
}

// Eight stored numbers as numbers of T, multiplied in float32 and rounded once. `part` is the
// quarter of the columns that is wanted of words.
template <class T, Base kBase>
SPEFT_DEVICE Some<uint16_t> widened(const Some<typename Stored<kBase>::Element>& stored, int part,
                                    float scale) {
    Some<uint16_t> numbers;
    SPEFT_UNROLL
    for (int i = 0; i < kChunk; ++i) {
        int number = 0;
        if constexpr (kBase == Base::kInt8) number = int8_t(stored.elements[i]);
        if constexpr (kBase == Base::kInt4) number = ((stored.elements[i] >> (4 * part)) & 15) - 8;
        numbers.elements[i] = narrow<T>(float(number) * scale).bits;
    }
    return numbers;
}

}  // namespace cuda
}  // namespace speft
