// The pybind11 face of the CPU kernels: pointers arrive as integers, the GIL is released
// while a kernel runs, and std::bad_alloc becomes MemoryError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace py = pybind11;
using speft::CompactIndices;
using speft::DType;
using speft::SampledEntries;

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

// The instruction sets of simd.h, the widest first.
struct InstructionSet {
    int registers;
    const char* name;
};
constexpr InstructionSet kInstructionSets[] = {
    {speft::kAvx512, "AVX-512"}, {speft::kAvx2, "AVX2"}, {speft::kBaseline, "baseline"}};

// Which one the vectorised loops run on.
const char* instruction_set() {
    for (const InstructionSet& set : kInstructionSets)
        if (set.registers == speft::registers) return set.name;
    return "unknown";
}

// Those that this processor has.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : kInstructionSets)
        if (set.registers <= speft::best_registers()) names.push_back(set.name);
    return names;
}

// For tests, which would otherwise see one set alone on each machine; not while a kernel runs.
void use_instruction_set(const std::string& name) {
    for (const InstructionSet& set : kInstructionSets)
        if (set.name == name && set.registers <= speft::best_registers()) {
            speft::registers = set.registers;
            return;
        }
    throw py::value_error("this processor has no instruction set " + name);
}

using Ptr = uintptr_t;

}  // namespace

PYBIND11_MODULE(_C, m) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    m.doc() = "Compiled CPU kernels of speft_kernels; call them through speft_kernels.ops.";
    m.def("instruction_set", &instruction_set);
    m.def("instruction_sets", &instruction_sets);
    m.def("use_instruction_set", &use_instruction_set);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def(
        "sparse_delta_matmul",
        [](Ptr y, int64_t y_stride, Ptr x, int64_t x_stride, int64_t in_features, int64_t tokens,
           Ptr rows, Ptr crow, int64_t num_rows, Ptr cols, Ptr local, int64_t num_cols, Ptr values,
           int dtype, int threads) {
            speft::sparse_delta_matmul(at<void>(y), y_stride, at<void>(x), x_stride, in_features,
                                       tokens, compact(rows, crow, num_rows, cols, local, num_cols),
                                       at<void>(values), DType(dtype), threads);
        },
        released);
    py::class_<SampledEntries>(m, "SampledEntries")
        .def(py::init([](Ptr rows, int64_t num_rows, Ptr cols, int64_t num_cols, Ptr entry_rows,
                         Ptr entry_cols, Ptr slots, int64_t num_entries, Ptr tile_rows,
                         Ptr tile_cols, Ptr tile_slots, int64_t num_tiles) {
            return SampledEntries{
                at<int32_t>(rows),       num_rows,
                at<int32_t>(cols),       num_cols,
                at<int32_t>(entry_rows), at<int32_t>(entry_cols),
                at<int32_t>(slots),      num_entries,
                at<int32_t>(tile_rows),  at<int32_t>(tile_cols),
                at<int32_t>(tile_slots), num_tiles,
            };
        }));
    m.def(
        "sampled_grad",
        [](Ptr dy, int64_t dy_stride, int64_t out_features, Ptr x, int64_t x_stride,
           int64_t in_features, bool packed, int64_t tokens, int64_t width,
           const SampledEntries& plan, Ptr out, bool accumulate, int dtype, int threads) {
            speft::sampled_grad(at<void>(dy), dy_stride, out_features, at<void>(x), x_stride,
                                in_features, packed, tokens, width, plan, at<void>(out), accumulate,
                                DType(dtype), threads);
        },
        released);
    m.def(
        "keep_columns",
        [](Ptr x, int64_t x_stride, int64_t in_features, int64_t tokens, Ptr columns,
           int64_t num_columns, int64_t width, Ptr kept, int dtype, int threads) {
            speft::keep_columns(at<void>(x), x_stride, in_features, tokens, at<int32_t>(columns),
                                num_columns, width, at<void>(kept), DType(dtype), threads);
        },
        released);
    m.def(
        "block_grad",
        [](Ptr dy, int64_t dy_stride, int64_t out_features, Ptr x, int64_t x_stride,
           int64_t in_features, int64_t tokens, Ptr block_rows, Ptr block_cols, int64_t num_blocks,
           int64_t height, int64_t width, Ptr out, bool accumulate, int dtype, int threads) {
            speft::block_grad(at<void>(dy), dy_stride, out_features, at<void>(x), x_stride,
                              in_features, tokens, at<int32_t>(block_rows), at<int32_t>(block_cols),
                              num_blocks, height, width, at<void>(out), accumulate, DType(dtype),
                              threads);
        },
        released);
    m.def("release_scratch", [] { speft::ScratchCache::of_this_thread().clear(); });
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
    m.def("write_delta", [](const std::vector<Ptr>& weights, const std::vector<Ptr>& indices,
                            const std::vector<bool>& wide_indices, const std::vector<int64_t>& nnz,
                            const std::vector<Ptr>& base, const std::vector<Ptr>& values, int dtype,
                            int threads) {
        std::vector<speft::DeltaWrite> deltas;
        for (size_t i = 0; i < weights.size(); ++i)
            deltas.push_back({at<void>(weights[i]), at<void>(indices[i]), wide_indices[i], nnz[i],
                              at<void>(base[i]), values.empty() ? nullptr : at<void>(values[i])});
        py::gil_scoped_release released;
        speft::write_delta(deltas.data(), int64_t(deltas.size()), DType(dtype), threads);
    });
}
