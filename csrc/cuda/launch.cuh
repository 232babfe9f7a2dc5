// The one way to start a kernel, and the one way a kernel reaches its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/grid.h"
#include "kernels/host_device.h"

namespace cuda_cnn::cuda {

// A block's shared memory as one struct, taken from the dynamic pool: pass sizeof(Shared) to launch.
template <class Shared>
__device__ __forceinline__ Shared& shared_storage() {
#if defined(CUDA_CNN_EMULATED)
  return *static_cast<Shared*>(emulation::shared_pool());
#else
  extern __shared__ __align__(1024) unsigned char shared_pool[];
  return *reinterpret_cast<Shared*>(shared_pool);
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error would otherwise show up again in the next call that looks
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Starts kernel(args...) on the stream; throws std::runtime_error where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, Stream stream,
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (grid.empty()) return;
  if (!grid.fits()) {
    throw std::runtime_error("kernel launch: more blocks than a grid may have, " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
  if (shared_bytes > 48 * 1024) {  // more than the default limit must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

}  // namespace cuda_cnn::cuda
