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

// Neighbouring elements of a row, in words as they came: taken apart where they are used, because
// what is taken apart where it is loaded is waited for there.
template <class Element, int kCount = kChunk>
struct Some {
    static constexpr int kEach = 4 / sizeof(Element);  // elements of a word
    uint32_t words[kCount / kEach];
    SPEFT_DEVICE Element operator[](int i) const {
        return Element(words[i / kEach] >> (8 * int(sizeof(Element)) * (i % kEach)));
    }
};

// kCount aligned elements in one load, or zeros.
template <int kCount, class Element>
SPEFT_DEVICE Some<Element, kCount> load(const Element* from, bool real) {
    using Bytes = std::conditional_t<kCount * sizeof(Element) == 16, Bytes16, Bytes8>;
    static_assert(sizeof(Bytes) == kCount * sizeof(Element), "one load");
    Bytes bytes = {};
    if (real) bytes = *reinterpret_cast<const Bytes*>(from);
    return bit_cast<Some<Element, kCount>>(bytes);
}

SPEFT_DEVICE uint32_t pair_of(uint16_t low, uint16_t high) {
    return uint32_t(low) | uint32_t(high) << 16;
}

// The group that columns around `column` share a scale with. In 32 bits, because 64 are divided by
// a hundred instructions.
SPEFT_DEVICE int group_of(const DeltaProduct& product, int64_t column) {
    return int(uint32_t(column) / uint32_t(product.group));
}

// A scale in the bits that it is stored in, and as a number: again apart, for the load's sake.
SPEFT_DEVICE uint32_t scale_bits(const DeltaProduct& product, int64_t row, int group) {
    const int64_t at = row * product.groups + group;
    return product.wide_scales ? static_cast<const uint32_t*>(product.scales)[at]
                               : static_cast<const uint16_t*>(product.scales)[at];
}

template <class T>
SPEFT_DEVICE float scale_of(const DeltaProduct& product, uint32_t bits) {
    T narrower;
    narrower.bits = uint16_t(bits);
    return product.wide_scales ? bit_cast<float>(bits) : widen(narrower);
}

// A number of four bits that is stored 8 too large: in the mantissa of 2^23, because to convert it
// takes the units of integers twice as long.
SPEFT_DEVICE float of_four_bits(uint32_t stored) {
    return bit_cast<float>(0x4b000000u | (stored & 15)) - float((1 << 23) + 8);
}

// Eight stored numbers as numbers of T, multiplied in float32 and rounded once. `part` is the
// quarter of the columns that is wanted of words.
template <class T, Base kBase>
SPEFT_DEVICE Some<uint16_t> widened(const Some<typename Stored<kBase>::Element>& stored, int part,
                                    float scale) {
    const auto number = [&](int i) {
        float whole = 0.0f;
        if constexpr (kBase == Base::kInt8) whole = float(int8_t(stored[i]));
        if constexpr (kBase == Base::kInt4) whole = of_four_bits(uint32_t(stored[i]) >> (4 * part));
        return narrow<T>(whole * scale).bits;
    };
    Some<uint16_t> numbers;
    SPEFT_UNROLL
    for (int w = 0; w < kChunk / 2; ++w)
        numbers.words[w] = pair_of(number(2 * w), number(2 * w + 1));
    return numbers;
}

}  // namespace cuda
}  // namespace speft
