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

// Element i of one and element j of another beside each other in a word: of bytes, with anything
// above each.
template <class Element>
SPEFT_DEVICE uint32_t beside(const Some<Element>& one, int i, const Some<Element>& other, int j) {
    constexpr int kEach = Some<Element>::kEach, kSize = sizeof(Element);
    const uint32_t first = i % kEach * kSize, second = j % kEach * kSize + 4;
    return bytes_of(one.words[i / kEach], other.words[j / kEach],
                    (first | second << 8) * 0x11 + (kSize == 2 ? 0x1010 : 0));
}

SPEFT_DEVICE uint32_t pair_of(uint16_t low, uint16_t high) {
    return uint32_t(low) | uint32_t(high) << 16;
}

// The group that columns around `column` share a scale with. In 32 bits, because 64 are divided by
// a hundred instructions.
SPEFT_DEVICE int group_of(const DeltaProduct& product, int64_t column) {
    return int(uint32_t(column) / uint32_t(product.group));
}

// Calls f with the scales, as words of the bits that they are stored in: float32, or x's dtype. One
// branch for all that f does.
template <Base kBase, class F>
SPEFT_DEVICE void by_scales(const DeltaProduct& product, F&& f) {
    if (Stored<kBase>::kQuantized && product.wide_scales)
        f(static_cast<const uint32_t*>(product.scales));
    else
        f(static_cast<const uint16_t*>(product.scales));
}

// Two stored numbers as numbers of T, exact. `stored` has each at the low end of a half, with
// anything above it. It goes into the mantissa of 1024 or 128, whose last bit is worth one, and
// that is subtracted: two or three instructions for both, where to convert each takes one of a unit
// a quarter as fast. A sign bit has no room in the mantissa of 128, but just above it makes 256 of
// 128, and that much is then to be subtracted.
template <class T, Base kBase>
SPEFT_DEVICE uint32_t whole_pair(uint32_t stored) {
    constexpr bool kLong = std::is_same<T, Float16>::value;  // ten bits of a mantissa, not seven
    constexpr uint32_t kOnes = kLong ? 0x64006400u : 0x43004300u;  // 1024 and 128
    if constexpr (kBase == Base::kInt4)                            // stored 8 too large
        return add_pairs<T>(masked(stored, 0x000f000fu, kOnes), kLong ? 0xe408e408u : 0xc308c308u);
    else if constexpr (kLong)  // 128 too large once its sign bit is turned
        return add_pairs<T>(masked(stored, 0x00ff00ffu, kOnes | 0x00800080u), 0xe480e480u);
    else
        return add_pairs<T>(masked(stored, 0x007f007fu, kOnes),
                            masked(stored, 0x00800080u, 0xc300c300u));
}

// Two stored elements, as `beside` has them, as numbers of T: multiplied by the scale of each in
// float32 and rounded once. Where the scales are of T that is one multiplication of T, because no
// stored number has more bits than T. `part` is the quarter of the columns that is wanted of words.
template <class T, Base kBase, class Scale>
SPEFT_DEVICE uint32_t number_pair(uint32_t stored, int part, uint32_t scale, uint32_t other_scale) {
    if constexpr (!Stored<kBase>::kQuantized) return stored;
    const uint32_t whole =
        whole_pair<T, kBase>(kBase == Base::kInt4 ? stored >> (4 * part) : stored);
    if constexpr (sizeof(Scale) == 2)
        return multiply_pairs<T>(whole, bytes_of(scale, other_scale, 0x5410));
    const T low = {uint16_t(whole)}, high = {uint16_t(whole >> 16)};
    return pair_of(narrow<T>(widen(low) * bit_cast<float>(scale)).bits,
                   narrow<T>(widen(high) * bit_cast<float>(other_scale)).bits);
}

// Elements 2 w and 2 w + 1 of a row as numbers of T.
template <class T, Base kBase, class Scale>
SPEFT_DEVICE uint32_t number_pair(const Some<typename Stored<kBase>::Element>& stored, int w,
                                  int part, uint32_t scale) {
    uint32_t pair;
    if constexpr (kBase == Base::kInt8)
        pair = beside(stored, 2 * w, stored, 2 * w + 1);
    else
        pair = stored.words[w];
    return number_pair<T, kBase, Scale>(pair, part, scale, scale);
}

}  // namespace cuda
}  // namespace speft
