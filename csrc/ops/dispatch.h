// From a Tensor to a kernel: the element type, the device, the stream. The only place that knows which of
// CPU, CUDA and emulated CUDA a build has.
#pragma once

#include <ATen/DeviceGuard.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "kernels/host_device.h"
#include "ops/build_note.h"
#include "ops/checks.h"

#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
#include "cuda/gpu.h"
#endif
#if defined(CUDA_CNN_WITH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

// The library that operators are registered in; the emulated build has one of its own.
#if defined(CUDA_CNN_EMULATED)
#define CUDA_CNN_LIBRARY cuda_cnn_emulated
#else
#define CUDA_CNN_LIBRARY cuda_cnn
#endif

namespace cuda_cnn::ops {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline const void* data(const at::Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_data(const at::Tensor& tensor) { return tensor.mutable_data_ptr(); }

#if defined(CUDA_CNN_WITH_CUDA)
inline Stream current_stream() { return at::cuda::getCurrentCUDAStream().stream(); }
#endif

// Whether a launch for this tensor runs CUDA kernels: on a GPU, or emulated.
inline bool uses_cuda_kernels(const at::Tensor& tensor) {
#if defined(CUDA_CNN_EMULATED)
  return tensor.defined();
#else
  return tensor.is_cuda();
#endif
}

constexpr c10::DispatchKey kCpuKeys[] = {c10::DispatchKey::CPU, c10::DispatchKey::SparseCPU,
                                         c10::DispatchKey::SparseCsrCPU, c10::DispatchKey::MkldnnCPU};
constexpr c10::DispatchKey kCudaKeys[] = {c10::DispatchKey::CUDA, c10::DispatchKey::SparseCUDA,
                                          c10::DispatchKey::SparseCsrCUDA};

// What a build without CUDA has for tensors on a GPU, whatever the other arguments.
[[noreturn]] inline void refuse_cuda(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK(false, op.operator_name().name, " was built without CUDA (", build_note(),
              "). See: python -m cuda_cnn env");
}

// Defines an operator and gives it one implementation for every kind of tensor: fn itself refuses what it
// cannot take (with a message that names the argument), and looks at the device when it launches.
template <class Fn>
void define(torch::Library& library, const std::string& schema, Fn* fn) {
  library.def(torch::schema(schema.c_str(), c10::AliasAnalysisKind::FROM_SCHEMA),
              {at::Tag::pt2_compliant_tag});
  const std::string name = schema.substr(0, schema.find('('));
  for (c10::DispatchKey key : kCpuKeys)
    library.impl(name.c_str(), torch::dispatch(key, torch::CppFunction(fn)));
  for (c10::DispatchKey key : kCudaKeys) {
#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
    library.impl(name.c_str(), torch::dispatch(key, torch::CppFunction(fn)));
#else
    library.impl(name.c_str(),
                 torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>()));
#endif
  }
}

}  // namespace cuda_cnn::ops

// LAUNCH(x, conv2d_forward, params): runs cpu::conv2d_forward or cuda::conv2d_forward where x lives.
#if defined(CUDA_CNN_EMULATED)
#define CUDA_CNN_LAUNCH(tensor, kernel, params)                       \
  do {                                                                \
    ::cuda_cnn::cuda::require_code_for_gpu(::cuda_cnn::build_note()); \
    ::cuda_cnn::cuda::kernel(params, nullptr);                        \
  } while (false)
#elif defined(CUDA_CNN_WITH_CUDA)
#define CUDA_CNN_LAUNCH(tensor, kernel, params)                            \
  do {                                                                     \
    if ((tensor).is_cuda()) {                                              \
      const c10::DeviceGuard guard((tensor).device());                     \
      ::cuda_cnn::cuda::require_code_for_gpu(::cuda_cnn::build_note());    \
      ::cuda_cnn::cuda::kernel(params, ::cuda_cnn::ops::current_stream()); \
    } else {                                                               \
      ::cuda_cnn::cpu::kernel(params);                                     \
    }                                                                      \
  } while (false)
#else
#define CUDA_CNN_LAUNCH(tensor, kernel, params) ::cuda_cnn::cpu::kernel(params)
#endif
