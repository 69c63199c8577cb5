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

// The same, where a warp's lanes come together and ask for one: they look at 32 at once.
SPEFT_DEVICE int matrix_with_for_warp(const Matrix* matrices, int count, int64_t Matrix::* field,
                                      int64_t at) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int step = (high - low + kWarp - 1) / kWarp, mine = low + lane_id() * step;
        const uint32_t within = lanes_with(mine < high && matrices[mine].*field <= at);
        low += (count_bits(within) - 1) * step;
        high = low + step < high ? low + step : high;
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

// The score that has a key. ~0, which no finite score has, gives no number, which none reaches.
SPEFT_DEVICE float score_of(uint32_t key) {
    return bit_cast<float>(key ^ (key >> 31 != 0 ? 0x80000000u : ~0u));
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
constexpr int kTileVectors = 2 * kAhead * kTileThreads;
template <class T>
constexpr int kTile = kTileVectors * kVector<T>;

template <class T>
struct Tile {
    const T* x;
    const T* y;
    int size;
    int vectors;  // entries that can be read 16 bytes at a time
    bool whole;   // all of kTile can
};

template <class T, bool kPair>
SPEFT_DEVICE Tile<T> tile_of(const Matrix& matrix, int64_t number) {
    const int64_t first = (number - matrix.first_tile) * kTile<T>;
    Tile<T> tile = {};
    tile.x = static_cast<const T*>(matrix.x) + first;
    if (kPair) tile.y = static_cast<const T*>(matrix.y) + first;
    tile.size = int(smaller(matrix.size - first, kTile<T>));
    const bool aligned =
        (reinterpret_cast<uintptr_t>(tile.x) | reinterpret_cast<uintptr_t>(tile.y)) % 16 == 0;
    tile.vectors = aligned ? tile.size / kVector<T> * kVector<T> : 0;
    tile.whole = tile.vectors == kTile<T>;
    return tile;
}

template <class T>
SPEFT_DEVICE T element(const Bytes16& vector, int i) {
    if constexpr (sizeof(T) == 4)
        return bit_cast<T>(vector.words[i]);
    else
        return {uint16_t(vector.words[i / 2] >> (16 * (i % 2)))};
}

// Neighbouring entries of a tile that is not whole; zeros beyond its end.
template <class T>
SPEFT_DEVICE Bytes16 vector_at(const Tile<T>& tile, const T* operand, int place) {
    if (place < tile.vectors) return read_only(reinterpret_cast<const Bytes16*>(operand + place));
    Bytes16 vector = {};
    SPEFT_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
        if (place + i >= tile.size) continue;
        const T number = read_only(operand + place + i);
        if constexpr (sizeof(T) == 4)
            vector.words[i] = bit_cast<uint32_t>(number);
        else
            vector.words[i / 2] |= uint32_t(number.bits) << (16 * (i % 2));
    }
    return vector;
}

// Calls f(vector, count, x, y) for vectors of a tile, by their numbers; `count` of the entries are
// the tile's. The first vectors of all threads come before their next ones, each time in the order
// of the threads. A thread has kUnderWay of each operand under way.
template <bool kPair, int kThreads, int kUnderWay, bool kWhole, class T, class F>
SPEFT_DEVICE void each_vector(const Tile<T>& tile, F&& f) {
    constexpr int kEach = kVector<T>;
    // Of a tile that is not whole fewer, for each takes the registers of eight loads.
    constexpr int kSome = kWhole ? kUnderWay : kUnderWay / 2;
    SPEFT_UNROLL_BY(1)
    for (int first = int(threadIdx.x) % kThreads; first < kTileVectors; first += kSome * kThreads) {
        const auto here = [first](const T* operand) {
            return reinterpret_cast<const Bytes16*>(operand) + first;
        };
        Bytes16 x[kSome], y[kSome] = {};  // asked for together, before the first is used
        SPEFT_UNROLL
        for (int v = 0; v < kSome; ++v) {
            if constexpr (kWhole) {
                x[v] = read_only(here(tile.x) + v * kThreads);
                if (kPair) y[v] = read_only(here(tile.y) + v * kThreads);
            } else {
                const int place = (first + v * kThreads) * kEach;
                x[v] = vector_at(tile, tile.x, place);
                if (kPair) y[v] = vector_at(tile, tile.y, place);
            }
        }
        SPEFT_UNROLL
        for (int v = 0; v < kSome; ++v) {
            const int vector = first + v * kThreads, left = tile.size - vector * kEach;
            f(vector, kWhole || left > kEach ? kEach : left > 0 ? left : 0, x[v], y[v]);
        }
    }
}

template <bool kPair, int kThreads, int kUnderWay, class T, class F>
SPEFT_DEVICE void each_vector(const Tile<T>& tile, F&& f) {
    if (tile.whole)
        each_vector<kPair, kThreads, kUnderWay, true>(tile, f);
    else
        each_vector<kPair, kThreads, kUnderWay, false>(tile, f);
}

// The keys of neighbouring entries of a tile, from `place` on.
template <int kMost>
struct Entries {
    uint32_t keys[kMost];
    int place;
    int count;
};

// Calls f(entries) for vectors of a tile, in the order of each_vector.
template <bool kPair, int kThreads, class T, class F>
SPEFT_DEVICE void visit(const Tile<T>& tile, Score score, F&& f) {
    const auto keys = [&](int vector, int count, const Bytes16& x, const Bytes16& y) {
        Entries<kVector<T>> entries = {{}, vector * kVector<T>, count};
        SPEFT_UNROLL
        for (int i = 0; i < kVector<T>; ++i) {
            float value = widen(element<T>(x, i));
            if (kPair) value *= widen(element<T>(y, i));
            entries.keys[i] = key_of(value, score);
        }
        f(entries);
    };
    each_vector<kPair, kThreads, kAhead>(tile, keys);
}

// Marks the entries of a tile that score `least` or more: marks[v] has a bit for each of the v-th
// vector. Returns whether all scores that this thread has seen are finite.
//
// A multiprocessor multiplies and adds floats twice as fast as it compares, selects or shifts. So
// no keys are made, and a byte's bits are added up in the fraction of a float.
template <bool kPair, int kUnderWay, class T>
SPEFT_DEVICE bool mark(const Tile<T>& tile, Score score, float least, uint8_t* marks) {
    // Of one operand of 16 bits the sign is seen to in both numbers of a word at once.
    const Score of_word = sizeof(T) == 4
                              ? score
                              : Score{(score.flip >> 16) * 0x10001u, (score.keep >> 16) * 0x10001u};
    float poison = 0;  // no number, once a score is infinite or none
    each_vector<kPair, kTileThreads, kUnderWay>(
        tile, [&](int vector, int count, Bytes16 x, const Bytes16& y) {
            SPEFT_UNROLL
            for (int i = 0; i < 4 && !kPair; ++i)
                x.words[i] = (x.words[i] ^ of_word.flip) & of_word.keep;
            float bits = 0x800000;  // whose last digit is 1
            SPEFT_UNROLL
            for (int i = 0; i < kVector<T>; ++i) {
                float value = widen(element<T>(x, i));
                if (kPair) {
                    value *= widen(element<T>(y, i));
                    value = bit_cast<float>((bit_cast<uint32_t>(value) ^ score.flip) & score.keep);
                }
                bits += reaches(value, least) * float(1 << i);
                poison += value * 0.0f;
            }
            marks[vector] = uint8_t(bit_cast<uint32_t>(bits) & ((1u << count) - 1));
        });
    return poison == 0.0f;
}

}  // namespace cuda
}  // namespace speft
