// device.h on a GPU: each name is an instruction or two. For sm_80 and later.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "kernels.h"

#define SPEFT_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define SPEFT_DEVICE __device__ __forceinline__
#define SPEFT_BOTH __host__ __device__ __forceinline__
#define SPEFT_UNROLL _Pragma("unroll")
#define SPEFT_TEXT(text) #text
#define SPEFT_UNROLL_BY(turns) _Pragma(SPEFT_TEXT(unroll turns))

namespace speft {
namespace cuda {

inline const char* device_error_text(int code) {
    return cudaGetErrorString(cudaError_t(code));
}

// The runtime remembers what failed until it is asked: asked here, so that no later launch finds
// the error of a call that the caller has been told of.
inline int told(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

template <class Kernel>
int allow_shared(Kernel kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return 0;  // what a block has without asking
    const int error =
        told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    return error == cudaErrorInvalidValue ? kTooLittleShared : error;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    if (const int error = allow_shared(kernel, shared_bytes)) return error;
    kernel<<<grid, threads, shared_bytes, cudaStream_t(stream)>>>(Parameters(arguments)...);
    return cudaGetLastError();
}

template <class... Parameters, class... Arguments>
int launch_resident(void (*kernel)(Parameters...), int64_t multiprocessors, int threads,
                    size_t shared_bytes, void* stream, Arguments... arguments) {
    if (const int error = allow_shared(kernel, shared_bytes)) return error;
    int each = 0;
    if (const int error = told(
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes)))
        return error;
    if (each == 0) return cudaErrorLaunchOutOfResources;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(multiprocessors) * unsigned(each));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = cudaStream_t(stream);
    config.attrs = &together;
    config.numAttrs = 1;
    return told(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <class T>
SPEFT_DEVICE T* shared_memory() {
    extern __shared__ __align__(16) unsigned char speft_shared[];
    return reinterpret_cast<T*>(speft_shared);
}

SPEFT_DEVICE void sync_block() {
    __syncthreads();
}

SPEFT_DEVICE void sync_grid() {
    cooperative_groups::this_grid().sync();
}

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
SPEFT_DEVICE T exchange_from(T value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
}

SPEFT_DEVICE uint32_t lanes_with(bool mine) {
    return __ballot_sync(kAllLanes, mine);
}

SPEFT_DEVICE uint32_t afresh(uint32_t word) {
    asm volatile("" : "+r"(word));
    return word;
}

template <class T>
SPEFT_DEVICE const T* afresh(const T* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}

// Written plainly, it becomes a comparison and then a choice between numbers.
SPEFT_DEVICE float reaches(float value, float least) {
    float one;
    asm("set.ge.f32.f32 %0, %1, %2;\n" : "=f"(one) : "f"(value), "f"(least));
    return one;
}

SPEFT_DEVICE int count_bits(uint32_t bits) {
    return __popc(bits);
}

SPEFT_DEVICE int lowest_bit(uint32_t bits) {
    return __ffs(int(bits)) - 1;
}

template <class To, class From>
SPEFT_DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

SPEFT_DEVICE uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t which) {
    return __byte_perm(low, high, which);
}

// Written plainly, with two constants, it becomes two.
SPEFT_DEVICE uint32_t masked(uint32_t bits, uint32_t mask, uint32_t flip) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;\n" : "=r"(result) : "r"(bits), "r"(mask), "r"(flip));
    return result;
}

template <class T>
using PairOf = std::conditional_t<std::is_same<T, Float16>::value, __half2, __nv_bfloat162>;

// By the intrinsics that are never fused with what is made of their result.
template <class T>
SPEFT_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hadd2_rn(bit_cast<PairOf<T>>(a), bit_cast<PairOf<T>>(b)));
}

template <class T>
SPEFT_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmul2_rn(bit_cast<PairOf<T>>(a), bit_cast<PairOf<T>>(b)));
}

// Of an address that comes out of a table the compiler cannot tell what memory it is in.
template <class T>
SPEFT_DEVICE T read_only(const T* global) {
    if constexpr (sizeof(T) == 16)
        return bit_cast<T>(__ldg(reinterpret_cast<const uint4*>(global)));
    else if constexpr (sizeof(T) == 4)
        return bit_cast<T>(__ldg(reinterpret_cast<const unsigned*>(global)));
    else
        return bit_cast<T>(__ldg(reinterpret_cast<const unsigned short*>(global)));
}

SPEFT_DEVICE void fence() {
    __threadfence();
}

SPEFT_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) {
    return atomicAdd(at, value);
}

SPEFT_DEVICE uint64_t atomic_add(uint64_t* at, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(at),
                     static_cast<unsigned long long>(value));
}

SPEFT_DEVICE uint64_t atomic_min(uint64_t* at, uint64_t value) {
    return atomicMin(reinterpret_cast<unsigned long long*>(at),
                     static_cast<unsigned long long>(value));
}

SPEFT_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

struct SharedAt {
    uint32_t address;
    SPEFT_DEVICE SharedAt operator+(int bytes) const { return {address + bytes}; }
};

SPEFT_DEVICE uint32_t shared_address(SharedAt place) {
    return place.address;
}

// Once: where the address's making is seen, the compiler makes it again at each use.
SPEFT_DEVICE SharedAt shared_at(const void* pointer) {
    return {afresh(shared_address(pointer))};
}

// In so many words, because the compiler splits 16 bytes where it sees fit.
template <class Place>
SPEFT_DEVICE void load_shared16(uint32_t (&words)[4], Place shared) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

SPEFT_DEVICE void store16(void* global, const uint32_t (&words)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

template <class Place>
SPEFT_DEVICE void cp_async16(Place shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

SPEFT_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kPending>
SPEFT_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

template <class Place>
SPEFT_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <class Place>
SPEFT_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <class T>
SPEFT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
SPEFT_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
SPEFT_DEVICE void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

SPEFT_DEVICE float widen(float x) {
    return x;
}
SPEFT_DEVICE double widen(double x) {
    return x;
}
SPEFT_DEVICE float widen(BFloat16 x) {
    return __uint_as_float(uint32_t(x.bits) << 16);
}
SPEFT_DEVICE float widen(Float16 x) {
    return __half2float(__ushort_as_half(x.bits));
}

template <class T>
SPEFT_DEVICE T narrow(Accumulator<T> x);
template <>
SPEFT_DEVICE float narrow<float>(float x) {
    return x;
}
template <>
SPEFT_DEVICE double narrow<double>(double x) {
    return x;
}
template <>
SPEFT_DEVICE BFloat16 narrow<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
SPEFT_DEVICE Float16 narrow<Float16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

}  // namespace cuda
}  // namespace speft
