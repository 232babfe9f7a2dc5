// Tensors that say that they are on a GPU, with their memory on the CPU: enough for what an operator checks.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

at::Tensor on_gpu(const at::Tensor& x, int64_t gpu) {
  const auto keep = [](void* tensor) { delete static_cast<at::Tensor*>(tensor); };
  auto* owner = new at::Tensor(x.detach());
  const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(gpu));
  c10::Storage storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(),
                       c10::DataPtr(owner->storage().mutable_data(), owner, keep, device), nullptr, false);
  at::Tensor y = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cuda_cnn_emulated, library) {
  library.def("on_gpu(Tensor x, int gpu) -> Tensor", &on_gpu);
}
