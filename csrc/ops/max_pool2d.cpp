#include "kernels/max_pool2d.h"

#include <limits>
#include <tuple>

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

constexpr const char* kOp = "max_pool2d";

using Ints = at::IntArrayRef;

PoolAxis make_axis(int64_t in, int k, Ints kernel, Ints stride, Ints padding, Ints dilation) {
  return {in, 0, kernel[k], stride[k], padding[k], dilation[k]};
}

void check_axis(const PoolAxis& axis) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(axis.kernel > 0 && axis.kernel <= kLimit, kOp,
              ": kernel size should be greater than zero, got ", axis.kernel);
  TORCH_CHECK(axis.stride > 0 && axis.stride <= kLimit, kOp, ": stride should be greater than zero, got ",
              axis.stride);
  TORCH_CHECK(axis.dilation > 0 && axis.dilation <= kLimit, kOp,
              ": dilation should be greater than zero, got ", axis.dilation);
  TORCH_CHECK(axis.pad >= 0, kOp, ": pad must be non-negative, but got pad: ", axis.pad);
  TORCH_CHECK(axis.pad <= ((axis.kernel - 1) * axis.dilation + 1) / 2, kOp,
              ": pad should be at most half of effective kernel size, but got pad=", axis.pad,
              ", kernel_size=", axis.kernel, " and dilation=", axis.dilation);
  TORCH_CHECK(axis.pad <= axis.kernel / 2, kOp,
              ": pad should be smaller than or equal to half of kernel size, got pad=", axis.pad,
              " and kernel_size=", axis.kernel);
}

// Shapes and checks of the unpooled side; the pooled sizes are the caller's to fill in.
MaxPool2dParams make_params(Ints shape, Ints kernel, Ints stride, Ints padding, Ints dilation) {
  for (const Ints list : {kernel, stride, padding, dilation}) {
    TORCH_CHECK(
        list.size() == 2, kOp,
        ": kernel_size, stride, padding and dilation must each be a single int, or a tuple of two ints");
  }
  TORCH_CHECK(shape.size() == 3 || shape.size() == 4, kOp, ": expected input of 3 or 4 dimensions, got ",
              shape.size(), " (shape ", shape, ")");
  const size_t c = shape.size() - 3;
  MaxPool2dParams p{};
  p.batch = shape.size() == 4 ? shape[0] : 1;
  p.channels = shape[c];
  p.h = make_axis(shape[c + 1], 0, kernel, stride, padding, dilation);
  p.w = make_axis(shape[c + 2], 1, kernel, stride, padding, dilation);
  check_axis(p.h);
  check_axis(p.w);
  TORCH_CHECK(p.channels > 0 && p.h.in > 0 && p.w.in > 0, kOp,
              ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, got shape ",
              shape);
  TORCH_CHECK(p.h.kernel * p.w.kernel <= std::numeric_limits<int32_t>::max(), kOp, ": a window of ",
              p.h.kernel, "x", p.w.kernel, " has too many cells");
  p.wide_taps = p.h.kernel * p.w.kernel > kMaxByteTaps;
  return p;
}

std::vector<int64_t> with_plane(Ints shape, int64_t height, int64_t width) {
  std::vector<int64_t> result = shape.vec();
  result[result.size() - 2] = height;
  result[result.size() - 1] = width;
  return result;
}

struct Pooled {
  at::Tensor y, taps, indices;
};

Pooled pool(const at::Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode,
            bool want_taps, bool want_indices) {
  check_tensor(kOp, "input", x);
  MaxPool2dParams p = make_params(x.sizes(), kernel, stride, padding, dilation);
  for (PoolAxis* axis : {&p.h, &p.w}) {
    axis->out = pooled_size(axis->in, axis->kernel, axis->stride, axis->pad, axis->dilation, ceil_mode);
  }
  TORCH_CHECK(p.h.out >= 1 && p.w.out >= 1, kOp, ": Output size is too small: an input of ", p.h.in, "x",
              p.w.in, " gives ", p.h.out, "x", p.w.out);
  const at::MemoryFormat format = format_of(x);
  const auto empty = [&](at::ScalarType dtype) {
    return empty_result(with_plane(x.sizes(), p.h.out, p.w.out),
                        x.options().dtype(dtype).memory_format(format));
  };
  Pooled out;
  out.y = empty(x.scalar_type());
  if (want_taps) out.taps = empty(p.wide_taps ? at::kInt : at::kByte);
  if (want_indices) out.indices = empty(at::kLong);
  if (x.numel() == 0) return out;
  const at::Tensor input = x.contiguous(format);
  p.input = data(input);
  p.output = mutable_data(out.y);
  p.taps = want_taps ? mutable_data(out.taps) : nullptr;
  p.indices = want_indices ? out.indices.mutable_data_ptr<int64_t>() : nullptr;
  p.channels_last = is_channels_last(format);
  p.dtype = dtype_of(x);
  CUDA_CNN_LAUNCH(x, max_pool2d, p);
  return out;
}

at::Tensor max_pool2d(const at::Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                      bool ceil_mode) {
  return pool(x, kernel, stride, padding, dilation, ceil_mode, false, false).y;
}

std::tuple<at::Tensor, at::Tensor> max_pool2d_with_taps(const at::Tensor& x, Ints kernel, Ints stride,
                                                        Ints padding, Ints dilation, bool ceil_mode) {
  const Pooled out = pool(x, kernel, stride, padding, dilation, ceil_mode, true, false);
  return {out.y, out.taps};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> max_pool2d_with_indices(const at::Tensor& x, Ints kernel,
                                                                       Ints stride, Ints padding,
                                                                       Ints dilation, bool ceil_mode) {
  const Pooled out = pool(x, kernel, stride, padding, dilation, ceil_mode, true, true);
  return {out.y, out.taps, out.indices};
}

// Parameters of the two linear maps that the taps define between the planes.
MaxPool2dParams linear_params(const at::Tensor& taps, const at::Device& device, Ints plane, Ints kernel,
                              Ints stride, Ints padding, Ints dilation) {
  TORCH_CHECK(taps.device() == device, kOp, ": expected taps on ", device, ", got ", taps.device());
  TORCH_CHECK(plane.size() == 2, kOp, ": expected input_size of two ints, got ", plane);
  TORCH_CHECK(taps.dim() == 3 || taps.dim() == 4, kOp, ": expected taps of 3 or 4 dimensions, got ",
              taps.dim());
  MaxPool2dParams p =
      make_params(with_plane(taps.sizes(), plane[0], plane[1]), kernel, stride, padding, dilation);
  TORCH_CHECK(taps.scalar_type() == (p.wide_taps ? at::kInt : at::kByte), kOp, ": expected taps of dtype ",
              p.wide_taps ? at::kInt : at::kByte, ", got ", taps.scalar_type());
  p.h.out = taps.size(-2);
  p.w.out = taps.size(-1);
  p.channels_last = is_channels_last(format_of(taps));
  return p;
}

at::Tensor max_pool2d_backward(const at::Tensor& dy, const at::Tensor& taps, Ints input_size, Ints kernel,
                               Ints stride, Ints padding, Ints dilation) {
  check_tensor(kOp, "grad_output", dy);
  MaxPool2dParams p = linear_params(taps, dy.device(), input_size, kernel, stride, padding, dilation);
  check_same_shape(kOp, "grad_output", dy, taps);
  const at::MemoryFormat format = format_of(taps);
  at::Tensor dx = empty_result(with_plane(taps.sizes(), p.h.in, p.w.in), dy.options().memory_format(format));
  if (dx.numel() == 0) return dx;
  const at::Tensor input = dy.contiguous(format), where = taps.contiguous(format);
  p.input = data(input);
  p.taps = const_cast<void*>(data(where));
  p.output = mutable_data(dx);
  p.dtype = dtype_of(dy);
  CUDA_CNN_LAUNCH(dy, max_pool2d_backward, p);
  return dx;
}

at::Tensor max_pool2d_gather(const at::Tensor& plane, const at::Tensor& taps, Ints kernel, Ints stride,
                             Ints padding, Ints dilation) {
  check_tensor(kOp, "input", plane);
  TORCH_CHECK(plane.dim() == taps.dim(), kOp, ": expected taps of ", plane.dim(), " dimensions, got ",
              taps.dim());
  MaxPool2dParams p = linear_params(taps, plane.device(), plane.sizes().slice(plane.dim() - 2), kernel,
                                    stride, padding, dilation);
  TORCH_CHECK(plane.sizes().slice(0, plane.dim() - 2) == taps.sizes().slice(0, taps.dim() - 2), kOp,
              ": expected taps with the batch and channels of ", plane.sizes(), ", got ", taps.sizes());
  const at::MemoryFormat format = format_of(taps);
  at::Tensor out = empty_result(taps.sizes(), plane.options().memory_format(format));
  if (out.numel() == 0) return out;
  const at::Tensor input = plane.contiguous(format), where = taps.contiguous(format);
  p.input = data(input);
  p.taps = const_cast<void*>(data(where));
  p.output = mutable_data(out);
  p.dtype = dtype_of(plane);
  CUDA_CNN_LAUNCH(plane, max_pool2d_gather, p);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  const std::string window = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation";
  const std::string forward = "(Tensor x, " + window + ", bool ceil_mode) -> ";
  define(library, "max_pool2d" + forward + "Tensor", &max_pool2d);
  define(library, "max_pool2d_with_taps" + forward + "(Tensor, Tensor)", &max_pool2d_with_taps);
  define(library, "max_pool2d_with_indices" + forward + "(Tensor, Tensor, Tensor)", &max_pool2d_with_indices);
  define(library,
         "max_pool2d_backward(Tensor dy, Tensor taps, SymInt[2] input_size, " + window + ") -> Tensor",
         &max_pool2d_backward);
  define(library, "max_pool2d_gather(Tensor x, Tensor taps, " + window + ") -> Tensor", &max_pool2d_gather);
}

}  // namespace cuda_cnn::ops
