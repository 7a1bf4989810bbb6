// Launching kernels on the device and the stream of a tensor. Except for the instruction in actnorm_conv1x1_mma.h, only
// this header distinguishes nvcc from the host shim of tests/cuda_host, which compiles the files of this folder as C++
// and runs their kernels on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Registers operators for CUDA tensors.
#define GLOW_KERNELS_CUDA_LIBRARY(module) STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CUDA, module)
// `name` is an array of `type` with these `dimensions`, [32] or [8][32], in shared memory.
#define GLOW_KERNELS_SHARED(type, name, dimensions) __shared__ type name dimensions
// `name` points to the shared memory that the launch asked for, aligned to 16 bytes.
#define GLOW_KERNELS_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char glow_kernels_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(glow_kernels_dynamic_shared)
#else
#define GLOW_KERNELS_CUDA_LIBRARY(module) STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, module)
#define GLOW_KERNELS_SHARED(type, name, dimensions) CUDA_HOST_SHARED(type, name, dimensions)
#define GLOW_KERNELS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_host::dynamic_shared())
#endif

namespace glow_kernels {

// The default number of threads of a block, a multiple of a warp's 32.
constexpr int kThreads = 256;

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

// For kernels followed by Launcher::next(): the next kernel may start once all blocks of this one have called it.
inline __device__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// For kernels launched by Launcher::next(): waits until the previous kernel has ended and its results can be read.
inline __device__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Makes the device of a tensor current during its lifetime, and launches on torch's current stream there.
class Launcher {
 public:
#if defined(__CUDACC__)
  explicit Launcher(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit Launcher(const torch::stable::Tensor&) {}
#endif

  // Runs kernel(arguments...) in `blocks` blocks of `threads` threads with `shared_bytes` of dynamic shared memory.
  // `threads` must be a multiple of 32. Does nothing if there are no blocks.
  template <typename... P, typename... A>
  void operator()(int64_t blocks, int threads, int64_t shared_bytes, void (*kernel)(P...),
                  const A&... arguments) const {
    start(false, blocks, 1, threads, shared_bytes, kernel, arguments...);
  }

  // The same with `layers` times as many blocks; blockIdx.y is the layer.
  template <typename... P, typename... A>
  void layered(int64_t layers, int64_t blocks, int threads, int64_t shared_bytes, void (*kernel)(P...),
               const A&... arguments) const {
    start(false, blocks, layers, threads, shared_bytes, kernel, arguments...);
  }

  // The same with kThreads threads and no dynamic shared memory.
  template <typename... P, typename... A>
  void operator()(int64_t blocks, void (*kernel)(P...), const A&... arguments) const {
    (*this)(blocks, kThreads, 0, kernel, arguments...);
  }

  // The same for a kernel that completes the work of the one just launched. From sm_90 on its blocks are scheduled
  // while the previous kernel still runs (programmatic dependent launch), so it must call wait_for_previous() before it
  // reads what that kernel writes, and before it writes.
  template <typename... P, typename... A>
  void next(int64_t blocks, int threads, int64_t shared_bytes, void (*kernel)(P...), const A&... arguments) const {
    start(true, blocks, 1, threads, shared_bytes, kernel, arguments...);
  }

  int64_t multiprocessors() const {
#if defined(__CUDACC__)
    return attribute(cudaDevAttrMultiProcessorCount);
#else
    return cuda_host::multiprocessors();
#endif
  }

  // Bytes of shared memory that a block can have.
  int64_t max_shared_bytes() const {
#if defined(__CUDACC__)
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#else
    return cuda_host::max_shared_bytes();
#endif
  }

  // Blocks that are resident at the same time: `most` per multiprocessor, or fewer with this much shared memory.
  int64_t resident_blocks([[maybe_unused]] int64_t shared_bytes, int64_t most) const {
#if defined(__CUDACC__)
    // The system takes 1 KiB more for every block.
    const int64_t fit = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (shared_bytes + 1024);
    return multiprocessors() * (fit < 1 ? 1 : fit < most ? fit : most);
#else
    return most + 1;  // several, whatever `most` is
#endif
  }

 private:
  template <typename... P, typename... A>
  void start([[maybe_unused]] bool follows, int64_t blocks, int64_t layers, int threads, int64_t shared_bytes,
             void (*kernel)(P...), const A&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(layers >= 1 && layers <= 65535, "a launch has 1 to 65535 layers of blocks, not ", layers);
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "a launch has at most 2^31 - 1 blocks, not ",
                    blocks);
    const unsigned grid_x = static_cast<unsigned>(blocks), grid_y = static_cast<unsigned>(layers);
    const unsigned block = static_cast<unsigned>(threads);
#if defined(__CUDACC__)
    if (shared_bytes > 48 * 1024) {
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
                 "asking for shared memory");
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_x, grid_y);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = follows && attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
#else
    cuda_host::launch(grid_x, grid_y, block, static_cast<size_t>(shared_bytes), [&] { kernel(arguments...); });
#endif
  }

#if defined(__CUDACC__)
  static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "asking for the device");
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace glow_kernels
