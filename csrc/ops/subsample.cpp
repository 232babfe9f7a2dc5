#include "kernels/subsample.h"

#include <tuple>

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

constexpr const char* kOp = "subsample";

Squash squash_of(c10::string_view name) {
  if (name == "tanh") return Squash::kTanh;
  if (name == "sigmoid") return Squash::kSigmoid;
  TORCH_CHECK_VALUE(name == "none", kOp, ": expected squash \"tanh\", \"sigmoid\" or \"none\", got \"", name,
                    "\"");
  return Squash::kNone;
}

void check_channels(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  check_like(kOp, name, tensor, x);
  const int64_t channels = x.size(x.dim() - 3);
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels, kOp, ": expected ", name, " of shape [",
              channels, "], got ", tensor.sizes());
}

SubsampleParams make_params(const at::Tensor& x, at::IntArrayRef kernel, c10::string_view squash) {
  check_tensor(kOp, "input", x);
  TORCH_CHECK(x.dim() == 3 || x.dim() == 4, kOp, ": expected input of 3 or 4 dimensions, got ", x.dim(),
              " (shape ", x.sizes(), ")");
  TORCH_CHECK(kernel.size() == 2, kOp, ": kernel_size must either be a single int, or a tuple of two ints");
  check_positive(kOp, "kernel_size", std::min(kernel[0], kernel[1]));
  SubsampleParams p{};
  p.batch = x.dim() == 4 ? x.size(0) : 1;
  p.channels = x.size(-3);
  p.height = x.size(-2);
  p.width = x.size(-1);
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.out_height = p.height / p.kernel_h;
  p.out_width = p.width / p.kernel_w;
  TORCH_CHECK(p.channels > 0 && p.out_height > 0 && p.out_width > 0, kOp,
              ": Output size is too small: an input of ", p.channels, "x", p.height, "x", p.width, " gives ",
              p.channels, "x", p.out_height, "x", p.out_width);
  p.squash = squash_of(squash);
  p.channels_last = is_channels_last(format_of(x));
  p.dtype = dtype_of(x);
  return p;
}

std::vector<int64_t> pooled_shape(const at::Tensor& x, const SubsampleParams& p) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape[shape.size() - 2] = p.out_height;
  shape[shape.size() - 1] = p.out_width;
  return shape;
}

at::Tensor subsample(const at::Tensor& x, const at::Tensor& coefficient, const at::Tensor& bias,
                     at::IntArrayRef kernel, c10::string_view squash) {
  SubsampleParams p = make_params(x, kernel, squash);
  check_channels("coefficient", coefficient, x);
  check_channels("bias", bias, x);
  const at::MemoryFormat format = format_of(x);
  at::Tensor y = empty_result(pooled_shape(x, p), x.options().memory_format(format));
  if (y.numel() == 0) return y;
  const at::Tensor input = x.contiguous(format), k = coefficient.contiguous(), b = bias.contiguous();
  p.x = data(input);
  p.coefficient = data(k);
  p.bias = data(b);
  p.y = mutable_data(y);
  CUDA_CNN_LAUNCH(x, subsample, p);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subsample_backward(const at::Tensor& dy, const at::Tensor& x,
                                                                  const at::Tensor& coefficient,
                                                                  const at::Tensor& y, at::IntArrayRef kernel,
                                                                  c10::string_view squash) {
  SubsampleParams p = make_params(x, kernel, squash);
  check_channels("coefficient", coefficient, x);
  for (const at::Tensor* tensor : {&dy, &y}) {
    const char* name = tensor == &dy ? "grad_output" : "output";
    check_like(kOp, name, *tensor, x);
    TORCH_CHECK(tensor->sizes() == at::IntArrayRef(pooled_shape(x, p)), kOp, ": expected ", name,
                " of shape ", pooled_shape(x, p), ", got ", tensor->sizes());
  }
  const at::MemoryFormat format = format_of(x);
  at::Tensor dx = empty_result(x.sizes(), x.options().memory_format(format));
  at::Tensor dcoefficient = at::zeros(coefficient.sizes(), x.options()), dbias = at::zeros_like(dcoefficient);
  if (x.numel() == 0) return {dx, dcoefficient, dbias};
  const at::ScalarType accumulator = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor partial =
      at::empty({subsample_bands(p.batch, p.out_height), 2, p.channels}, x.options().dtype(accumulator));
  const at::Tensor input = x.contiguous(format), output = y.contiguous(format), grad = dy.contiguous(format);
  const at::Tensor k = coefficient.contiguous();
  p.x = data(input);
  p.coefficient = data(k);
  p.y = const_cast<void*>(data(output));
  p.dy = data(grad);
  p.dx = mutable_data(dx);
  p.dcoefficient = mutable_data(dcoefficient);
  p.dbias = mutable_data(dbias);
  p.partial = mutable_data(partial);
  CUDA_CNN_LAUNCH(x, subsample_backward, p);
  return {dx, dcoefficient, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(library,
         "subsample(Tensor x, Tensor coefficient, Tensor bias, int[2] kernel_size, str squash) -> Tensor",
         &subsample);
  define(library,
         "subsample_backward(Tensor dy, Tensor x, Tensor coefficient, Tensor y, int[2] kernel_size, str "
         "squash) -> "
         "(Tensor, Tensor, Tensor)",
         &subsample_backward);
}

}  // namespace cuda_cnn::ops
