// The pybind11 face of the CPU kernels: one line a kernel. Pointers arrive as integers, the GIL is
// released while a kernel runs, and std::bad_alloc becomes MemoryError.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;
using speft::CompactIndices;
using speft::DType;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

CompactIndices compact(uintptr_t rows, uintptr_t crow, int64_t num_rows, uintptr_t cols,
                       uintptr_t local, int64_t num_cols) {
    return {at<const int32_t>(rows), at<const int64_t>(crow),  num_rows,
            at<const int32_t>(cols), at<const int32_t>(local), num_cols};
}

// Which instruction set the multiversioned loops run on here.
const char* instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return "AVX-512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
    return "baseline";
}

using Ptr = uintptr_t;

}  // namespace

PYBIND11_MODULE(_C, m) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    m.doc() = "Compiled CPU kernels of speft_kernels; call them through speft_kernels.ops.";
    m.def("instruction_set", &instruction_set);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def(
        "sparse_delta_matmul",
        [](Ptr y, int64_t y_stride, Ptr x, int64_t x_stride, int64_t tokens, Ptr rows, Ptr crow,
           int64_t num_rows, Ptr cols, Ptr local, int64_t num_cols, Ptr values, int dtype,
           int threads) {
            speft::sparse_delta_matmul(at<void>(y), y_stride, at<void>(x), x_stride, tokens,
                                       compact(rows, crow, num_rows, cols, local, num_cols),
                                       at<void>(values), DType(dtype), threads);
        },
        released);
    m.def(
        "sampled_grad",
        [](Ptr dy, int64_t dy_stride, Ptr x, int64_t x_stride, int64_t tokens, Ptr rows, Ptr crow,
           int64_t num_rows, Ptr cols, Ptr local, int64_t num_cols, Ptr out, bool accumulate,
           int dtype, int threads) {
            speft::sampled_grad(at<void>(dy), dy_stride, at<void>(x), x_stride, tokens,
                                compact(rows, crow, num_rows, cols, local, num_cols), at<void>(out),
                                accumulate, DType(dtype), threads);
        },
        released);
    m.def(
        "block_grad",
        [](Ptr dy, int64_t dy_stride, Ptr x, int64_t x_stride, int64_t tokens, Ptr block_rows,
           Ptr block_cols, int64_t num_blocks, int64_t height, int64_t width, Ptr out,
           bool accumulate, int dtype, int threads) {
            speft::block_grad(at<void>(dy), dy_stride, at<void>(x), x_stride, tokens,
                              at<int32_t>(block_rows), at<int32_t>(block_cols), num_blocks, height,
                              width, at<void>(out), accumulate, DType(dtype), threads);
        },
        released);
    m.def(
        "topk_salience",
        [](Ptr weights, Ptr grads, Ptr sizes, int64_t num_matrices, int64_t k, int metric,
           Ptr indices, Ptr counts, int dtype, int threads) {
            return speft::topk_salience(at<const void* const>(weights),
                                        at<const void* const>(grads), at<int64_t>(sizes),
                                        num_matrices, k, metric, at<int64_t>(indices),
                                        at<int64_t>(counts), DType(dtype), threads);
        },
        released);
    m.def(
        "write_delta",
        [](Ptr weight, Ptr indices, bool wide_indices, int64_t nnz, Ptr base, Ptr values, int dtype,
           int threads) {
            speft::write_delta(at<void>(weight), at<void>(indices), wide_indices, nnz,
                               at<void>(base), at<void>(values), DType(dtype), threads);
        },
        released);
}
