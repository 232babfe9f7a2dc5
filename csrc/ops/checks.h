// Each check and its wording, once. An operator calls them before it allocates.
#pragma once

#include <ATen/core/Tensor.h>

namespace cuda_cnn::ops {

// A dense tensor of one of the four element types. NotImplementedError, as torch's operators have it, is a
// RuntimeError too.
inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, op, ": expected ", name,
                              " to be a dense (strided) tensor, got ", tensor.layout());
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
      ": expected ", name, " of dtype float32, float64, bfloat16 or float16, got ", type);
}

// other, a tensor as check_tensor wants it, with the dtype and on the device of the operator's input.
inline void check_like(const char* op, const char* name, const at::Tensor& other, const at::Tensor& input) {
  TORCH_CHECK(other.layout() == at::kStrided, op, ": expected ", name,
              " to be a dense (strided) tensor, got ", other.layout());
  TORCH_CHECK(other.scalar_type() == input.scalar_type(), op, ": expected ", name, " of dtype ",
              input.scalar_type(), " like input, got ", other.scalar_type());
  TORCH_CHECK(other.device() == input.device(), op, ": expected ", name, " on ", input.device(),
              " like input, got ", other.device());
}

inline void check_same_shape(const char* op, const char* name, const at::Tensor& other,
                             const at::Tensor& input) {
  TORCH_CHECK(other.sizes() == input.sizes(), op, ": expected ", name, " of shape ", input.sizes(), ", got ",
              other.sizes());
}

inline void check_positive(const char* op, const char* name, int64_t value) {
  TORCH_CHECK(value > 0, op, ": expected ", name, " > 0, got ", value);
}

inline void check_dim(const char* op, const char* name, const at::Tensor& tensor, int64_t dim) {
  TORCH_CHECK(tensor.dim() == dim, op, ": expected ", name, " of ", dim, " dimensions, got ", tensor.dim(),
              " (shape ", tensor.sizes(), ")");
}

}  // namespace cuda_cnn::ops
