// The pybind11 face of the CUDA kernels: pointers and the stream arrive as integers, the GIL is
// released, and a launcher's error becomes an exception that names the operation and the shapes.
// Built twice: for the GPU, and against host/device.h for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#ifdef SPEFT_ON_HOST
    #include "cuda/host/counts.h"
    #include "cuda/host/fibers.h"
    #define SPEFT_MODULE _cuda_host
#else
    #define SPEFT_MODULE _cuda
#endif

namespace py = pybind11;
namespace cuda = speft::cuda;
using speft::DType;
using Ptr = uintptr_t;

namespace {

template <class T>
T* at(Ptr address) {
    return reinterpret_cast<T*>(address);
}

struct Named {
    const char* name;
    int64_t value;
};

// Throws what a launcher's code means, with the operation and its sizes.
void check(int code, const char* operation, std::initializer_list<Named> sizes) {
    if (code == 0) return;
    std::string text = std::string(operation) + " (";
    for (const Named& size : sizes)
        text += (size.name == sizes.begin()->name ? "" : ", ") + std::string(size.name) + " " +
                std::to_string(size.value);
    throw std::runtime_error(text + ") failed: " + cuda::error_text(code));
}

}  // namespace

PYBIND11_MODULE(SPEFT_MODULE, m) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    m.doc() = "Compiled CUDA kernels of speft_kernels; call them through speft_kernels.ops.";
#ifdef SPEFT_ON_HOST
    m.def("set_seed", &cuda::host::set_seed);
    m.def("take_counts", [] {
        const cuda::host::Counts found = cuda::host::take_counts();
        return std::map<std::string, uint64_t>{{"copies", found.copies},
                                               {"copy_cycles", found.copy_cycles},
                                               {"copied_bytes", found.copied_bytes},
                                               {"products", found.products},
                                               {"matrix_reads", found.matrix_reads},
                                               {"matrix_cycles", found.matrix_cycles},
                                               {"vector_reads", found.vector_reads},
                                               {"vector_cycles", found.vector_cycles}};
    });
#endif
    m.def("write_delta",
          [](const std::vector<Ptr>& weights, const std::vector<Ptr>& indices,
             const std::vector<bool>& wide_indices, const std::vector<int64_t>& nnz,
             const std::vector<Ptr>& base, const std::vector<Ptr>& values, int dtype, Ptr stream) {
              std::vector<cuda::DeltaWrite> deltas;
              int64_t entries = 0;
              for (size_t i = 0; i < weights.size(); entries += nnz[i++])
                  deltas.push_back({at<void>(weights[i]), at<void>(indices[i]), at<void>(base[i]),
                                    values.empty() ? nullptr : at<void>(values[i]), nnz[i],
                                    wide_indices[i]});
              py::gil_scoped_release released;
              check(cuda::write_delta(deltas.data(), int64_t(deltas.size()), DType(dtype),
                                      at<void>(stream)),
                    "write_delta", {{"weights", int64_t(deltas.size())}, {"entries", entries}});
          });
    m.def(
        "sparse_delta_matmul",
        [](Ptr x, int64_t x_stride, int64_t tokens, Ptr weight, int64_t weight_stride, int64_t rows,
           int64_t cols, int base, Ptr scales, bool wide_scales, int64_t group, Ptr bias,
           Ptr starts, Ptr places, Ptr order, Ptr values, Ptr y, bool twin, int64_t multiprocessors,
           int64_t tile_tokens, int dtype, Ptr stream) {
            const cuda::DeltaProduct product = {at<void>(x),
                                                x_stride,
                                                tokens,
                                                at<void>(weight),
                                                weight_stride,
                                                rows,
                                                cols,
                                                at<void>(scales),
                                                wide_scales,
                                                group,
                                                cols / group,
                                                at<void>(bias),
                                                at<int32_t>(starts),
                                                at<uint16_t>(places),
                                                at<int32_t>(order),
                                                at<float>(values),
                                                at<void>(y),
                                                multiprocessors,
                                                tile_tokens};
            check(cuda::sparse_delta_matmul(product, cuda::Base(base), twin, DType(dtype),
                                            at<void>(stream)),
                  "sparse_delta_matmul", {{"tokens", tokens}, {"rows", rows}, {"columns", cols}});
        },
        released);
    m.def(
        "block_grad",
        [](Ptr dy, int64_t dy_stride, Ptr x, int64_t x_stride, int64_t tokens, Ptr block_rows,
           Ptr block_cols, int64_t num_blocks, int64_t height, int64_t width, Ptr out,
           bool accumulate, Ptr scratch, int64_t splits, int dtype, Ptr stream) {
            const cuda::BlockGrad problem = {at<void>(dy),
                                             dy_stride,
                                             at<void>(x),
                                             x_stride,
                                             tokens,
                                             at<int32_t>(block_rows),
                                             at<int32_t>(block_cols),
                                             num_blocks,
                                             height,
                                             width,
                                             at<float>(out),
                                             accumulate,
                                             at<float>(scratch),
                                             splits};
            check(
                cuda::block_grad(problem, DType(dtype), at<void>(stream)), "block_grad",
                {{"tokens", tokens}, {"blocks", num_blocks}, {"height", height}, {"width", width}});
        },
        released);
    // Local, because both builds may be loaded in one process.
    py::class_<cuda::TopkPlan>(m, "TopkPlan", py::module_local())
        .def_property_readonly("table",
                               [](const cuda::TopkPlan& plan) {
                                   return py::bytes(plan.table.data(), plan.table.size());
                               })
        .def_readonly("scratch_bytes", &cuda::TopkPlan::scratch_bytes);
    m.def("plan_topk", [](const std::vector<Ptr>& x, const std::vector<Ptr>& y,
                          const std::vector<int64_t>& sizes, const std::vector<int64_t>& ks,
                          bool together, int64_t multiprocessors, int dtype) {
        cuda::TopkProblem problem = {{}, {}, sizes, ks, together, DType(dtype), multiprocessors};
        for (const Ptr address : x)
            problem.x.push_back(at<void>(address));
        for (const Ptr address : y)
            problem.y.push_back(at<void>(address));
        return cuda::plan_topk(problem);
    });
    m.def(
        "topk_salience",
        [](const cuda::TopkPlan& plan, Ptr table, Ptr scratch, int metric, Ptr indices, Ptr told,
           bool resident, int64_t pending, int dtype, Ptr stream) {
            const cuda::TopkCall call = {
                at<void>(table),    at<void>(scratch), metric,  at<int64_t>(indices),
                at<uint64_t>(told), pending,           resident};
            check(cuda::topk_salience(plan.sizes, call, DType(dtype), at<void>(stream)),
                  "topk_salience",
                  {{"matrices", plan.sizes.matrices}, {"tiles", plan.sizes.tiles}});
        },
        released);
    m.def(
        "keep_columns",
        [](Ptr x, int64_t stride, int64_t tokens, Ptr columns, int64_t width, int64_t block_tokens,
           int64_t blocks, Ptr kept, Ptr stream) {
            const cuda::KeepColumns problem = {
                at<void>(x), stride,       tokens, at<int32_t>(columns),
                width,       block_tokens, blocks, at<void>(kept)};
            check(cuda::keep_columns(problem, at<void>(stream)), "keep_columns",
                  {{"tokens", tokens}, {"columns", width}, {"tokens of a block", block_tokens}});
        },
        released);
    m.def(
        "sampled_grad",
        [](Ptr dy, int64_t dy_stride, int64_t out_features, Ptr x, int64_t x_stride, int64_t tokens,
           Ptr tile_block, Ptr tile_lines, Ptr tile_groups, Ptr tile_entries, int64_t tiles,
           Ptr line, Ptr group_rows, Ptr strip_line, Ptr entry_at, Ptr slot, int64_t nnz, Ptr out,
           bool accumulate, Ptr scratch, int64_t splits, int dtype, Ptr stream) {
            const cuda::SampledGrad problem = {at<void>(dy),
                                               dy_stride,
                                               out_features,
                                               at<void>(x),
                                               x_stride,
                                               tokens,
                                               at<int32_t>(tile_block),
                                               at<int32_t>(tile_lines),
                                               at<int32_t>(tile_groups),
                                               at<int32_t>(tile_entries),
                                               tiles,
                                               at<int32_t>(line),
                                               at<uint8_t>(group_rows),
                                               at<int16_t>(strip_line),
                                               at<int16_t>(entry_at),
                                               at<int32_t>(slot),
                                               nnz,
                                               at<float>(out),
                                               accumulate,
                                               at<float>(scratch),
                                               splits};
            check(cuda::sampled_grad(problem, DType(dtype), at<void>(stream)), "sampled_grad",
                  {{"tokens", tokens}, {"out_features", out_features}, {"entries", nnz}});
        },
        released);
}
