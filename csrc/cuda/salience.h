// The keys of the scores, a tile of a matrix at a time: what topk_salience.cu reads of the data.
#pragma once

#include "device.h"

namespace speft {
namespace cuda {

// One operand, or two whose product the score is made of.
struct Matrix {
    const void* x;
    const void* y;
    int64_t size;
    int64_t first_tile;
    int64_t start;  // entries before it in what is ranked together
};

// The last matrix of which `field` is not beyond `at`: the one that has it, as empty ones stand
// before or after.
SPEFT_DEVICE int matrix_with(const Matrix* matrices, int count, int64_t Matrix::* field,
                             int64_t at) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (matrices[middle].*field <= at ? low : high) = middle;
    }
    return low;
}

// What is done to the bits of x, or of x y: the sign flipped, and then kept or not.
struct Score {
    uint32_t flip;
    uint32_t keep;
};

// Keys have the order of the scores; both zeros have one. No finite score has a key below kLeast or
// beyond kLeast + kSpan.
constexpr uint32_t kLeast = 0x00800000u;
constexpr uint32_t kSpan = 0xff7fffffu - kLeast;

SPEFT_DEVICE uint32_t key_of(float value, Score score) {
    const float scored = bit_cast<float>((bit_cast<uint32_t>(value) ^ score.flip) & score.keep);
    const uint32_t bits = bit_cast<uint32_t>(scored + 0.0f);  // -0 becomes 0
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

template <class T, bool kPair>
SPEFT_DEVICE uint32_t key_at(const T* x, const T* y, int64_t i, Score score) {
    float value = widen(read_only(x + i));
    if (kPair) value *= widen(read_only(y + i));
    return key_of(value, score);
}

template <class T>
constexpr int kVector = 16 / int(sizeof(T));
constexpr int kAhead = 4;          // vectors of each operand that a thread has under way
constexpr int kTileThreads = 512;  // of the kernel that reads a tile at once
template <class T>
constexpr int kTile = kTileThreads * kAhead * kVector<T>;

template <class T>
struct Tile {
    const T* x;
    const T* y;
    int size;
    bool whole;  // of kTile entries, and aligned for 16 bytes at a time
};

template <class T, bool kPair>
SPEFT_DEVICE Tile<T> tile_of(const Matrix& matrix, int64_t number) {
    const int64_t first = (number - matrix.first_tile) * kTile<T>;
    const int64_t left = matrix.size - first;
    Tile<T> tile = {};
    tile.x = static_cast<const T*>(matrix.x) + first;
    if (kPair) tile.y = static_cast<const T*>(matrix.y) + first;
    tile.size = int(left < kTile<T> ? left : kTile<T>);
    tile.whole =
        tile.size == kTile<T> &&
        (reinterpret_cast<uintptr_t>(tile.x) | reinterpret_cast<uintptr_t>(tile.y)) % 16 == 0;
    return tile;
}

template <class T>
SPEFT_DEVICE T element(const Bytes16& vector, int i) {
    if constexpr (sizeof(T) == 4)
        return bit_cast<T>(vector.words[i]);
    else
        return {uint16_t(vector.words[i / 2] >> (16 * (i % 2)))};
}

// Where in its tile the `slot`-th entry of this thread lies, where kThreads of a block take it.
template <class T, int kThreads>
SPEFT_DEVICE int place_of(int slot) {
    const int thread = int(threadIdx.x) % kThreads;
    return (slot / kVector<T> * kThreads + thread) * kVector<T> + slot % kVector<T>;
}

// Neighbouring entries of a tile, from `place` on.
template <int kMost>
struct Entries {
    uint32_t keys[kMost];
    int place;
    int count;
};

// Calls f(slot, entries) for vectors of a tile. The first slots of all threads come before their
// next ones, each time in the order of the threads.
template <bool kPair, int kThreads, class T, class F>
SPEFT_DEVICE void visit_vectors(const Tile<T>& tile, Score score, F&& f) {
    constexpr int kEach = kVector<T>, kSlots = kTile<T> / kThreads;
    if (!tile.whole) {
        for (int slot = 0; slot < kSlots; slot += kEach) {
            Entries<kEach> entries = {{}, place_of<T, kThreads>(slot), 0};
            SPEFT_UNROLL
            for (int i = 0; i < kEach; ++i) {
                if (entries.place + i >= tile.size) continue;
                entries.keys[i] = key_at<T, kPair>(tile.x, tile.y, entries.place + i, score);
                entries.count = i + 1;
            }
            f(slot, entries);
        }
        return;
    }
    for (int first = 0; first < kSlots; first += kAhead * kEach) {
        Bytes16 x[kAhead], y[kAhead];  // asked for together, before the first is used
        SPEFT_UNROLL
        for (int v = 0; v < kAhead; ++v) {
            const int place = place_of<T, kThreads>(first + v * kEach);
            x[v] = read_only(reinterpret_cast<const Bytes16*>(tile.x + place));
            if (kPair) y[v] = read_only(reinterpret_cast<const Bytes16*>(tile.y + place));
        }
        SPEFT_UNROLL
        for (int v = 0; v < kAhead; ++v) {
            const int slot = first + v * kEach;
            Entries<kEach> entries = {{}, place_of<T, kThreads>(slot), kEach};
            SPEFT_UNROLL
            for (int i = 0; i < kEach; ++i) {
                float value = widen(element<T>(x[v], i));
                if (kPair) value *= widen(element<T>(y[v], i));
                entries.keys[i] = key_of(value, score);
            }
            f(slot, entries);
        }
    }
}

// Calls f(slot, key) for the entries of a tile that fall to this thread. The slot counts them, from
// 0 to 31 at most where kThreads is kTileThreads.
template <bool kPair, int kThreads, class T, class F>
SPEFT_DEVICE void visit(const Tile<T>& tile, Score score, F&& f) {
    visit_vectors<kPair, kThreads>(tile, score, [&](int slot, const auto& entries) {
        SPEFT_UNROLL
        for (int i = 0; i < kVector<T>; ++i)
            if (i < entries.count) f(slot + i, entries.keys[i]);
    });
}

}  // namespace cuda
}  // namespace speft
