// device.h on a CPU, for the tests: threads are fibers (fibers.h), a warp's operations wait for all
// of its lanes, an asynchronous copy arrives as late as the wait for it allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../cpu/dtype.h"
#include "counts.h"
#include "fibers.h"
#include "races.h"

#define SPEFT_KERNEL(...) void
#define SPEFT_DEVICE inline
#define SPEFT_BOTH inline
#define SPEFT_UNROLL
#define SPEFT_UNROLL_BY(turns)

namespace speft {
namespace cuda {

using speft::bit_cast;
using speft::widen;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

inline const char* device_error_text(int) {
    return host::last_error().c_str();
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void*,
           Arguments... arguments) {
    const bool ended = host::run_grid({grid.x, grid.y, grid.z}, threads, shared_bytes, false,
                                      [&] { kernel(Parameters(arguments)...); });
    return ended ? 0 : 1;
}

template <class... Parameters, class... Arguments>
int launch_resident(void (*kernel)(Parameters...), int64_t multiprocessors, int threads,
                    size_t shared_bytes, void*, Arguments... arguments) {
    const bool ended = host::run_grid({unsigned(multiprocessors), 1, 1}, threads, shared_bytes,
                                      true, [&] { kernel(Parameters(arguments)...); });
    return ended ? 0 : 1;
}

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(host::shared_memory());
}

using SharedAt = unsigned char*;
inline SharedAt shared_at(void* pointer) {
    return static_cast<SharedAt>(pointer);
}

// A default argument is evaluated where the call stands, so these know the kernel's line.
inline void sync_block(int line = __builtin_LINE()) {
    host::barrier(line);
}

inline void sync_grid(int line = __builtin_LINE()) {
    host::barrier_of_grid(line);
}

namespace host {

template <class T>
SPEFT_UNWATCHED T of_lane(const unsigned char* all, int lane) {
    T value;
    std::memcpy(&value, all + size_t(lane) * kSlot, sizeof(T));
    return value;
}

template <class T>
const unsigned char* gather(const T& mine, int line) {
    static_assert(sizeof(T) <= kSlot && std::is_trivially_copyable<T>::value, "fits a slot");
    return exchange(&mine, sizeof(T), line);
}

}  // namespace host

template <class T>
T exchange_from(T value, int lane, int line = __builtin_LINE()) {
    return host::of_lane<T>(host::gather(value, line), lane);
}

inline uint32_t lanes_with(bool mine, int line = __builtin_LINE()) {
    const unsigned char* const all = host::gather(mine, line);
    uint32_t lanes = 0;
    for (int lane = 0; lane < 32; ++lane)
        lanes |= uint32_t(host::of_lane<bool>(all, lane)) << lane;
    return lanes;
}

template <class T>
T afresh(T same) {
    return same;
}

inline float reaches(float value, float least) {
    return value >= least ? 1.0f : 0.0f;
}

inline int count_bits(uint32_t bits) {
    return __builtin_popcount(bits);
}

inline int lowest_bit(uint32_t bits) {
    return __builtin_ctz(bits);
}

inline uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i)
        bytes |= uint32_t(both >> (8 * (which >> 4 * i & 7)) & 0xff) << 8 * i;
    return bytes;
}

inline uint32_t masked(uint32_t bits, uint32_t mask, uint32_t flip) {
    return (bits & mask) ^ flip;
}

template <class T>
T read_only(const T* global) {
    return *global;
}

inline void fence() {
    host::fence();
}

// Relaxed, as the GPU's: alone they order nothing.
template <class T>
T atomic_add(T* at, T value) {
    const T former = __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
    host::at_atomic(at);
    return former;
}

template <class T>
T atomic_min(T* at, T value) {
    T former = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < former && !__atomic_compare_exchange_n(at, &former, value, false,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    host::at_atomic(at);
    return former;
}

inline void load_shared16(uint32_t (&words)[4], const void* shared, int line = __builtin_LINE()) {
    host::expect_aligned(shared, line);
    host::races::read(shared, 16);
    const unsigned char* all = host::gather(reinterpret_cast<uint64_t>(shared), line);
    if (host::lane() == 0) host::count_vector_read(all, host::kSlot);
    std::memcpy(words, shared, 16);
}

inline void store16(void* global, const uint32_t (&words)[4], int line = __builtin_LINE()) {
    host::expect_aligned(global, line);
    host::races::written(global, 16);
    std::memcpy(global, words, 16);
}

inline void cp_async16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    host::expect_aligned(shared, line);
    host::expect_aligned(global, line);
    host::count_copied(valid);
    host::copy_later(shared, global, valid);
}

inline void cp_async_commit() {
    host::commit();
}

template <int kPending>
void cp_async_wait() {
    host::wait(kPending);
}

namespace host {

struct Row {
    uint64_t address;
    uint16_t elements[8];
};

// A lane brings the address of one row of one 8 x 8 matrix: lanes 8 i to 8 i + 7 those of matrix i.
template <bool kTrans>
void load_matrices(uint32_t (&fragment)[4], const void* row, int line) {
    Row mine = {reinterpret_cast<uint64_t>(row), {}};
    expect_aligned(row, line);
    races::read(row, sizeof(mine.elements));
    std::memcpy(mine.elements, row, sizeof(mine.elements));
    const unsigned char* all = gather(mine, line);
    if (lane() == 0) count_matrix_read(all, kSlot);
    const int first = lane() / 4, pair = lane() % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t found[2];
        for (int i = 0; i < 2; ++i) {
            const int r = kTrans ? pair + i : first, c = kTrans ? first : pair + i;
            found[i] = of_lane<Row>(all, 8 * matrix + r).elements[c];
        }
        fragment[matrix] = uint32_t(found[0]) | uint32_t(found[1]) << 16;
    }
}

struct Operands {
    uint32_t a[4], b[2];
};

template <class T>
float element(uint32_t pair, int which) {
    T value;
    value.bits = uint16_t(pair >> (16 * which));
    return widen(value);
}

}  // namespace host

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, int line = __builtin_LINE()) {
    host::load_matrices<false>(fragment, row, line);
}

inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row,
                              int line = __builtin_LINE()) {
    host::load_matrices<true>(fragment, row, line);
}

// D [16, 8] += A [16, 16] B [16, 8]. The fragments as PTX lays them out: with g = lane / 4 and
// t = lane % 4, a holds A[g + 8 (i % 2), 2 t + 8 (i / 2) + {0, 1}], b holds B[2 t + 8 i + {0, 1},
// g], and d holds D[g + 8 (i / 2), 2 t + i % 2].
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  int line = __builtin_LINE()) {
    host::Operands mine;
    std::memcpy(mine.a, a, sizeof(mine.a));
    std::memcpy(mine.b, b, sizeof(mine.b));
    const unsigned char* all = host::gather(mine, line);
    if (host::lane() == 0) host::count_product();
    const int group = host::lane() / 4, pair = host::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + 8 * (i / 2), col = 2 * pair + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2;
            const auto left = host::of_lane<host::Operands>(all, row % 8 * 4 + holder);
            const auto right = host::of_lane<host::Operands>(all, col * 4 + holder);
            sum += host::element<T>(left.a[row / 8 + 2 * (k / 8)], k % 2) *
                   host::element<T>(right.b[k / 8], k % 2);
        }
        d[i] += sum;
    }
}

template <class T>
T narrow(Accumulator<T> x) {
    T result;
    speft::narrow(x, &result);
    return result;
}

namespace host {

template <class T>
uint32_t pair(float low, float high) {
    return uint32_t(cuda::narrow<T>(low).bits) | uint32_t(cuda::narrow<T>(high).bits) << 16;
}

}  // namespace host

// Float32 has more than twice the bits of T: a sum or product rounded to it and then to T is what
// it would be rounded to T at once.
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
    return host::pair<T>(host::element<T>(a, 0) + host::element<T>(b, 0),
                         host::element<T>(a, 1) + host::element<T>(b, 1));
}

template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return host::pair<T>(host::element<T>(a, 0) * host::element<T>(b, 0),
                         host::element<T>(a, 1) * host::element<T>(b, 1));
}

}  // namespace cuda
}  // namespace speft
