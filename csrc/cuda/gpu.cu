// A kernel that does nothing stands for all of them: every file is compiled for the same architectures.
#include "cuda/gpu.h"

#include "cuda/launch.cuh"

namespace cuda_cnn::cuda {
namespace {

__global__ void sentinel() {}

bool has_code(cudaError_t error) {
  return error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction;
}

std::string no_code_for(int device, const std::string& held) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "properties of the GPU");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "properties of the GPU");
  const std::string x = std::to_string(major), y = std::to_string(minor);
  return "this GPU is sm_" + x + y + "; the build holds " + held +
         ". Rebuild with TORCH_CUDA_ARCH_LIST=" + x + "." + y + ". See: python -m cuda_cnn env";
}

}  // namespace

void require_code_for_gpu(const std::string& held) {
  thread_local uint64_t passed = 0;  // a bit for each of the first 64 GPUs
  int device = 0;
  check(cudaGetDevice(&device), "current GPU");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (passed & bit) return;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, sentinel);
  if (has_code(error)) {
    check(error, "kernels on the GPU");
    passed |= bit;
    return;
  }
  cudaGetLastError();  // it would otherwise show up again in the next call that looks
  throw std::runtime_error(no_code_for(device, held));
}

}  // namespace cuda_cnn::cuda
