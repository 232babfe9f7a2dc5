#include "kernels/local_response_norm.h"

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

constexpr const char* kOp = "local_response_norm";

LocalResponseNormParams make_params(const at::Tensor& x, at::MemoryFormat format, int64_t size, double alpha,
                                    double beta, double k) {
  LocalResponseNormParams p{};
  const int64_t positions = x.numel() / (x.size(0) * x.size(1));
  p.outer = is_channels_last(format) ? x.size(0) * positions : x.size(0);
  p.channels = x.size(1);
  p.inner = is_channels_last(format) ? 1 : positions;
  p.dtype = dtype_of(x);
  p.size = size;
  p.alpha = alpha;
  p.beta = beta;
  p.k = k;
  return p;
}

void check(const at::Tensor& x, int64_t size) {
  check_tensor(kOp, "input", x);
  TORCH_CHECK_VALUE(x.dim() >= 3, kOp, ": expected input of 3 or more dimensions, got ", x.dim(), " (shape ",
                    x.sizes(), ")");
  check_positive(kOp, "size", size);
}

at::Tensor local_response_norm(const at::Tensor& x, int64_t size, double alpha, double beta, double k) {
  check(x, size);
  const at::MemoryFormat format = format_of(x);
  at::Tensor y = empty_result(x.sizes(), x.options().memory_format(format));
  if (x.numel() == 0) return y;
  const at::Tensor input = x.contiguous(format);
  LocalResponseNormParams p = make_params(x, format, size, alpha, beta, k);
  p.x = data(input);
  p.out = mutable_data(y);
  CUDA_CNN_LAUNCH(x, local_response_norm_forward, p);
  return y;
}

at::Tensor local_response_norm_backward(const at::Tensor& dy, const at::Tensor& x, int64_t size, double alpha,
                                        double beta, double k) {
  check(x, size);
  check_like(kOp, "grad_output", dy, x);
  check_same_shape(kOp, "grad_output", dy, x);
  const at::MemoryFormat format = format_of(x);
  at::Tensor dx = empty_result(x.sizes(), x.options().memory_format(format));
  if (x.numel() == 0) return dx;
  const at::Tensor input = x.contiguous(format), grad = dy.contiguous(format);
  LocalResponseNormParams p = make_params(x, format, size, alpha, beta, k);
  p.x = data(input);
  p.dy = data(grad);
  p.out = mutable_data(dx);
  CUDA_CNN_LAUNCH(x, local_response_norm_backward, p);
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(library, "local_response_norm(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
         &local_response_norm);
  define(library,
         "local_response_norm_backward(Tensor dy, Tensor x, int size, float alpha, float beta, float k) -> "
         "Tensor",
         &local_response_norm_backward);
}

}  // namespace cuda_cnn::ops
