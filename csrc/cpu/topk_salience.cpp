// topk_salience: the k largest scores, computed on the fly from (w, g), over one matrix or many.
//
// Radix select. A score's bits are mapped to an unsigned key of the same order. The first pass
// over (w, g) counts the keys by their high 12 bits; the bin of the k-th largest key is the
// boundary. The last pass emits every key above the boundary and the keys of the boundary bin as
// candidates, already in order, because each thread knows from its own counts where its part
// starts. What is missing is then chosen among the boundary's candidates: largest first, ties to
// the lowest index. Only where the boundary bin is crowded (many equal scores, say) further passes
// count the next 12 bits of that bin first.
//
// Memory: a histogram a thread, and 16 bytes for each of at most k + max(k, 65536) candidates.
// Count (n entries of b bytes): two passes, 2 x 2 n b bytes read, and about 1.2 n increments in L1.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace speft {
namespace {

constexpr int kDigitBits = 12;
constexpr int kBins = 1 << kDigitBits;
constexpr int kChunk = 1024;                  // entries whose keys are computed at a time, in L1
constexpr int kGroup = 32;                    // keys tested at once for being candidates
constexpr int64_t kFlush = int64_t(1) << 30;  // entries after which 32-bit counters are emptied

template <class Acc>
struct KeyOf {
    using type = uint32_t;
};
template <>
struct KeyOf<double> {
    using type = uint64_t;
};
template <class Acc>
using Key = typename KeyOf<Acc>::type;

// The codes that Python passes (speft_kernels/ops/topk_salience.py).
enum Metric : int { kMagnitude = 0, kGradient = 1, kSnip = 2, kForce = 3, kRaw = 4 };

template <class Acc>
SPEFT_INLINE Key<Acc> to_key(Acc score) {
    using K = Key<Acc>;
    constexpr K sign = K(1) << (8 * sizeof(K) - 1);
    const K given = bit_cast<K>(score);
    // -0 becomes 0: they are one score. Adding 0 would become a fused multiply-add with the product
    // that a score is, and that of an underflowing one is -0.
    const K bits = given == sign ? K(0) : given;
    return bits & sign ? ~bits : bits | sign;
}

// NaN and infinities are the keys with a full exponent.
template <class Acc>
SPEFT_INLINE bool is_finite_key(Key<Acc> key) {
    using K = Key<Acc>;
    const K top = to_key(std::numeric_limits<Acc>::infinity());
    const K bottom = to_key(-std::numeric_limits<Acc>::infinity());
    return key > bottom && key < top;
}

// Writes the keys of `count` entries; returns whether all scores are finite.
template <class T>
SPEFT_INLINE bool score_keys(const T* w, const T* g, int64_t count, int metric,
                             Key<Accumulator<T>>* keys) {
    using Acc = Accumulator<T>;
    switch (metric) {
        case kMagnitude:
            for (int64_t i = 0; i < count; ++i)
                keys[i] = to_key(std::abs(widen(w[i])));
            break;
        case kGradient:
            for (int64_t i = 0; i < count; ++i)
                keys[i] = to_key(std::abs(widen(g[i])));
            break;
        case kSnip:
            for (int64_t i = 0; i < count; ++i)
                keys[i] = to_key(std::abs(widen(w[i]) * widen(g[i])));
            break;
        case kForce:
            for (int64_t i = 0; i < count; ++i)
                keys[i] = to_key(-(widen(w[i]) * widen(g[i])));
            break;
        case kRaw:
            for (int64_t i = 0; i < count; ++i)
                keys[i] = to_key(widen(g[i]));
            break;
    }
    int finite = 1;
    for (int64_t i = 0; i < count; ++i)
        finite &= int(is_finite_key<Acc>(keys[i]));
    return finite != 0;
}

// Whether any of kGroup keys is at least `least`.
template <class K>
SPEFT_INLINE bool any_of_group(const K* keys, K least) {
    int any = 0;
    for (int i = 0; i < kGroup; ++i)
        any |= int(keys[i] >= least);
    return any != 0;
}

// Appends the positions of the groups of kGroup keys (the last may be padding) that hold a
// candidate; returns their number.
template <class K>
SPEFT_INLINE int groups_with(const K* keys, int64_t count, K least, int16_t* groups) {
    int found = 0;
    for (int64_t i = 0; i < count; i += kGroup) {
        groups[found] = int16_t(i);
        found += any_of_group(keys + i, least);
    }
    return found;
}

template <class K>
struct Candidate {
    int64_t position;  // in the concatenation of all matrices
    K key;
};

template <class T>
class Selection {
    using Acc = Accumulator<T>;
    using K = Key<Acc>;
    static constexpr int kKeyBits = 8 * sizeof(K);

  public:
    Selection(const void* const* weights, const void* const* grads, const int64_t* sizes,
              int64_t num_matrices, int metric, int threads)
        : weights_(weights), grads_(grads), starts_(num_matrices + 1, 0), metric_(metric) {
        for (int64_t i = 0; i < num_matrices; ++i)
            starts_[i + 1] = starts_[i] + sizes[i];
        parts_ = int(std::max<int64_t>(1, std::min<int64_t>(threads, total() / (16 * kChunk))));
        histograms_.resize(size_t(parts_) * kBins);
    }

    int64_t run(int64_t k, int64_t* indices, int64_t* counts) {
        int64_t missing = k;  // still to be found in the boundary bin
        K boundary = 0;       // its keys are boundary << shift and up
        int shift = kKeyBits;
        bool first = true;
        std::vector<int64_t> above_of(parts_, 0), equal_of(parts_, 0);
        const int64_t room = std::max<int64_t>(k, 65536);
        int64_t crowd;
        do {
            const int digit_bits = std::min(kDigitBits, shift);
            shift -= digit_bits;
            const int64_t bad = count_digits(boundary, shift, digit_bits, first);
            if (bad >= 0) return bad;
            first = false;
            const int digit = boundary_digit(digit_bits, &missing, &above_of, &equal_of);
            boundary = (boundary << digit_bits) | K(digit);
            crowd = 0;
            for (int64_t equal : equal_of)
                crowd += equal;
        } while (crowd > std::max(room, missing) && shift > 0);

        // Where the keys of the boundary are all one key, no more than the missing ones are
        // emitted.
        if (shift == 0) {
            int64_t left = missing;
            for (int64_t& equal : equal_of)
                left -= equal = std::min(equal, left);
        }
        std::vector<int64_t> offsets(parts_ + 1, 0);
        for (int p = 0; p < parts_; ++p)
            offsets[p + 1] = offsets[p] + above_of[p] + equal_of[p];
        std::vector<Candidate<K>> candidates(static_cast<size_t>(offsets[parts_]));
        emit(boundary << shift, boundary, shift, equal_of, offsets, candidates.data());
        choose(candidates, boundary, shift, missing, indices, counts);
        return -1;
    }

  private:
    int64_t total() const { return starts_.back(); }

    // Calls f(matrix, keys, position, count) over the chunks of one part, in order.
    template <class F>
    void for_chunks(int part, F&& f) const {
        alignas(kVectorBytes) K keys[kChunk + kGroup];
        const Range range = share(total(), part, parts_, kChunk);
        size_t matrix = size_t(std::upper_bound(starts_.begin(), starts_.end(), range.begin) -
                               starts_.begin() - 1);
        for (int64_t at = range.begin; at < range.end;) {
            while (starts_[matrix + 1] <= at)
                ++matrix;
            const int64_t inside = at - starts_[matrix];
            const int64_t count =
                std::min({int64_t(kChunk), range.end - at, starts_[matrix + 1] - at});
            const T* w = static_cast<const T*>(weights_[matrix]);
            const T* g = static_cast<const T*>(grads_[matrix]);
            if (w != nullptr) w += inside;
            if (g != nullptr) g += inside;
            const bool finite = vectorised(
                [&](auto) SPEFT_INLINED { return score_keys(w, g, count, metric_, keys); });
            if (!f(int64_t(matrix), keys, at, count, finite)) return;
            at += count;
        }
    }

    // Counts, for each part, the next digit of the keys that begin with `prefix`. Returns -1 or, on
    // the first pass, the first matrix with a score that is not finite.
    int64_t count_digits(K prefix, int shift, int digit_bits, bool first) {
        std::vector<int64_t> bad(parts_, -1);
        parallel(parts_, [&](Worker worker) {
            for (int part = worker.index; part < parts_; part += worker.count) {
                int64_t* histogram = &histograms_[size_t(part) * kBins];
                std::fill(histogram, histogram + kBins, 0);
                // Neighbouring scores often share a bin; two counters keep the increments
                // independent.
                alignas(kVectorBytes) uint32_t even[kBins] = {}, odd[kBins] = {};
                int64_t since_flush = 0;
                const auto flush = [&] {
                    for (int b = 0; b < kBins; ++b) {
                        histogram[b] += int64_t(even[b]) + odd[b];
                        even[b] = odd[b] = 0;
                    }
                    since_flush = 0;
                };
                const K mask = (K(1) << digit_bits) - 1;
                for_chunks(part, [&](int64_t matrix, K* keys, int64_t, int64_t count, bool finite) {
                    if (first && !finite) {
                        bad[part] = matrix;
                        return false;
                    }
                    if (first) {
                        int64_t i = 0;
                        for (; i + 2 <= count; i += 2) {
                            ++even[keys[i] >> shift];
                            ++odd[keys[i + 1] >> shift];
                        }
                        if (i < count) ++even[keys[i] >> shift];
                    } else {
                        for (int64_t i = 0; i < count; ++i)
                            if (keys[i] >> shift >> digit_bits == prefix)
                                ++even[(keys[i] >> shift) & mask];
                    }
                    if ((since_flush += count) >= kFlush) flush();
                    return true;
                });
                flush();
            }
        });
        int64_t worst = -1;
        for (int64_t matrix : bad)
            if (matrix >= 0 && (worst < 0 || matrix < worst)) worst = matrix;
        return worst;
    }

    // Finds the digit that holds the missing-th largest key; moves the digits above it from
    // `missing` to each part's `above_of`, and counts the digit itself in `equal_of`.
    int boundary_digit(int digit_bits, int64_t* missing, std::vector<int64_t>* above_of,
                       std::vector<int64_t>* equal_of) const {
        for (int digit = (1 << digit_bits) - 1;; --digit) {
            int64_t sum = 0;
            for (int p = 0; p < parts_; ++p)
                sum += histograms_[size_t(p) * kBins + digit];
            const bool found = sum >= *missing;
            for (int p = 0; p < parts_; ++p) {
                const int64_t count = histograms_[size_t(p) * kBins + digit];
                if (found)
                    (*equal_of)[p] = count;
                else
                    (*above_of)[p] += count;
            }
            if (found) return digit;
            *missing -= sum;
        }
    }

    void emit(K least, K boundary, int shift, const std::vector<int64_t>& equal_of,
              const std::vector<int64_t>& offsets, Candidate<K>* candidates) const {
        parallel(parts_, [&](Worker worker) {
            for (int part = worker.index; part < parts_; part += worker.count) {
                Candidate<K>* out = candidates + offsets[part];
                Candidate<K>* const end = candidates + offsets[part + 1];
                int64_t equal = equal_of[part];
                int16_t groups[kChunk / kGroup + 1];
                for_chunks(part, [&](int64_t, K* keys, int64_t at, int64_t count, bool) {
                    std::fill(keys + count, keys + count + kGroup, K(0));
                    const int found = vectorised([&](auto) SPEFT_INLINED {
                        return groups_with(keys, count, least, groups);
                    });
                    for (int i = 0; i < found; ++i) {
                        const int64_t stop = std::min<int64_t>(groups[i] + kGroup, count);
                        for (int64_t j = groups[i]; j < stop; ++j) {
                            if (keys[j] < least) continue;
                            if (keys[j] >> shift == boundary && equal-- <= 0) continue;
                            *out++ = {at + j, keys[j]};
                        }
                    }
                    return out != end;
                });
            }
        });
    }

    // Keeps the candidates above the boundary and the `missing` best inside it.
    void choose(const std::vector<Candidate<K>>& candidates, K boundary, int shift, int64_t missing,
                int64_t* indices, int64_t* counts) const {
        std::vector<K> inside;
        for (const auto& c : candidates)
            if (c.key >> shift == boundary) inside.push_back(c.key);
        const auto last = inside.begin() + (missing - 1);
        std::nth_element(inside.begin(), last, inside.end(), std::greater<K>());
        const K least = *last;
        int64_t ties = missing;
        for (auto it = inside.begin(); it != last; ++it)
            ties -= *it > least;
        std::fill(counts, counts + starts_.size() - 1, 0);
        size_t matrix = 0;
        for (const auto& c : candidates) {
            if (c.key < least || (c.key == least && ties-- <= 0)) continue;
            while (starts_[matrix + 1] <= c.position)
                ++matrix;
            *indices++ = c.position - starts_[matrix];
            ++counts[matrix];
        }
    }

    const void* const* weights_;
    const void* const* grads_;
    std::vector<int64_t> starts_;  // of each matrix in the concatenation, and the end
    int metric_;
    int parts_;
    std::vector<int64_t> histograms_;
};

}  // namespace

int64_t topk_salience(const void* const* weights, const void* const* grads, const int64_t* sizes,
                      int64_t num_matrices, int64_t k, int metric, int64_t* indices,
                      int64_t* counts, DType dtype, int threads) {
    int64_t bad = -1;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        bad = Selection<T>(weights, grads, sizes, num_matrices, metric, threads)
                  .run(k, indices, counts);
    });
    return bad;
}

}  // namespace speft
