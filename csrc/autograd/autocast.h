// The Autocast layer of an operator: its tensors in the dtype that it wants, and the call without autocast.
#pragma once

#include <ATen/autocast_mode.h>

#include <optional>

namespace cuda_cnn::autograd {

// Autocast is off while one of these lives.
template <c10::DeviceType kDevice>
class Autocast {
 public:
  // float32, bfloat16 and float16 are cast to `dtype` (the user's low precision if none), others stay.
  explicit Autocast(std::optional<at::ScalarType> dtype = std::nullopt)
      : dtype_(dtype ? *dtype : at::autocast::get_autocast_dtype(kDevice)),
        off_(c10::DispatchKeySet(kDevice == at::kCPU ? c10::DispatchKey::AutocastCPU
                                                     : c10::DispatchKey::AutocastCUDA)) {}

  template <class T>
  T operator()(const T& tensor) const {
    return at::autocast::cached_cast(dtype_, tensor, kDevice);
  }

 private:
  at::ScalarType dtype_;
  c10::impl::ExcludeDispatchKeyGuard off_;
};

}  // namespace cuda_cnn::autograd
