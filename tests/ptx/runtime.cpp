// What nvcc's host code asks of the CUDA runtime: launches go to the emulator, which finds a kernel
// by its name in the PTX files of the folder $SPEFT_PTX.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>

#include "ptx.h"

namespace {

// Of an H200: what a block may have of shared memory without asking, and at most.
constexpr size_t kUnasked = 48 * 1024, kMostShared = 227 * 1024;

struct Function {
    std::string name;
    size_t shared_bytes = kUnasked;
};

// Kernels are registered before other globals of this file need to exist.
std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> all;
    return all;
}

std::mutex mutex;
uint64_t seed = 0, launches = 0;
struct {
    dim3 grid, block;
    size_t shared_bytes = 0;
    void* stream = nullptr;
} configuration;
cudaError_t last = cudaSuccess;
std::string reason;

cudaError_t failed(cudaError_t error, const std::string& why) {
    reason = why;
    return last = error;
}

ptx::Kernel& kernel(const std::string& name) {
    static std::vector<ptx::Module> modules;
    if (modules.empty()) {
        const char* const folder = getenv("SPEFT_PTX");
        if (folder == nullptr) throw ptx::Error("SPEFT_PTX names no folder");
        for (const auto& file : std::filesystem::directory_iterator(folder))
            modules.emplace_back(file.path().string());
    }
    for (ptx::Module& module : modules) {
        const auto found = module.kernels.find(name);
        if (found == module.kernels.end()) continue;
        if (!found->second.body.empty()) decode(module, found->second);
        return found->second;
    }
    throw ptx::Error("no kernel " + name);
}

cudaError_t launch(const void* entry, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                   bool cooperative) {
    const std::lock_guard<std::mutex> lock(mutex);
    const Function& function = functions().at(entry);
    const bool fits = grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
    if (!fits || block.y != 1 || block.z != 1 || shared_bytes > function.shared_bytes)
        return failed(cudaErrorInvalidConfiguration, "a launch that is too large");
    try {
        const ptx::Kernel& found = kernel(function.name);
        ptx::Launch launch = {{grid.x, grid.y, grid.z}, block.x, shared_bytes, {}, cooperative};
        launch.parameters.resize(found.parameter_bytes);
        for (size_t i = 0; i < found.parameters.size(); ++i)
            memcpy(&launch.parameters[found.parameters[i].offset], arguments[i],
                   found.parameters[i].size);
        run(found, launch, seed * 1000003 + launches++);
    } catch (const ptx::Error& error) {
        return failed(cudaErrorLaunchFailure, error.what());
    }
    return cudaSuccess;
}

}  // namespace

extern "C" {

void ptx_set_seed(uint64_t fresh) {
    seed = fresh;
    launches = 0;
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* entry, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
    functions()[entry].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
    *kernel = cudaKernel_t(entry);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* entry, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
    return launch(entry, grid, block, arguments, shared_bytes, false);
}
// The name of the same in some toolkits.
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* entry,
                                void** arguments) {
    if (config->numAttrs != 1 || config->attrs->id != cudaLaunchAttributeCooperative)
        return failed(cudaErrorInvalidValue, "a launch with unknown attributes");
    return launch(entry, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                  config->attrs->val.cooperative != 0);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || size_t(value) > kMostShared)
        return failed(cudaErrorInvalidValue, "too much shared memory");
    functions().at(entry).shared_bytes = size_t(value);
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t) {
    return reason.c_str();
}

}  // extern "C"
