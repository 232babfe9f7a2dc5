// From a Tensor to a kernel: the element type, the device, the stream. The only place that knows which of
// CPU, CUDA and emulated CUDA a build has.
#pragma once

#include <ATen/DeviceGuard.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "kernels/host_device.h"
#include "ops/build_note.h"
#include "ops/checks.h"

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

// Defines an operator and gives it one implementation for every kind of tensor: fn itself refuses what it
// cannot take (with a message that names the argument), and looks at the device when it launches.
template <class Fn>
void define(torch::Library& library, const std::string& schema, Fn* fn) {
  library.def(torch::schema(schema.c_str(), c10::AliasAnalysisKind::FROM_SCHEMA),
              {at::Tag::pt2_compliant_tag});
  const std::string name = schema.substr(0, schema.find('('));
  using Key = c10::DispatchKey;
  for (Key key : {Key::CPU, Key::CUDA, Key::SparseCPU, Key::SparseCUDA, Key::SparseCsrCPU, Key::SparseCsrCUDA,
                  Key::MkldnnCPU}) {
    library.impl(name.c_str(), torch::dispatch(key, torch::CppFunction(fn)));
  }
}

}  // namespace cuda_cnn::ops

// LAUNCH("conv2d", x, conv2d_forward, params): runs cpu::conv2d_forward or cuda::conv2d_forward where x
// lives.
#if defined(CUDA_CNN_EMULATED)
#define CUDA_CNN_LAUNCH(op, tensor, kernel, params) ::cuda_cnn::cuda::kernel(params, nullptr)
#elif defined(CUDA_CNN_WITH_CUDA)
#define CUDA_CNN_LAUNCH(op, tensor, kernel, params)                        \
  do {                                                                     \
    if ((tensor).is_cuda()) {                                              \
      const c10::DeviceGuard guard((tensor).device());                     \
      ::cuda_cnn::cuda::kernel(params, ::cuda_cnn::ops::current_stream()); \
    } else {                                                               \
      ::cuda_cnn::cpu::kernel(params);                                     \
    }                                                                      \
  } while (false)
#else
#define CUDA_CNN_LAUNCH(op, tensor, kernel, params)                                 \
  do {                                                                              \
    TORCH_CHECK(!(tensor).is_cuda(), "cuda_cnn::", op, " was built without CUDA (", \
                ::cuda_cnn::build_note(), "). See: python -m cuda_cnn env");        \
    ::cuda_cnn::cpu::kernel(params);                                                \
  } while (false)
#endif
