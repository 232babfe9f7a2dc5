// What the kernels that walk over windows, without a matrix product, are given: depthwise.cu,
// few_channels.cu.
#pragma once

#include "cuda/conv2d/problem.h"

namespace cuda_cnn::cuda::conv2d {

// One thread's pixels are those of `out`: y's, reading x; dx's, reading dy.
struct Windows {
  const void *source, *weight, *bias, *residual;
  void* out;
  int64_t source_pixel, out_pixel, residual_pixel;
  int images, inputs, outputs, R, S;  // inputs: the source's channels
  int source_height, source_width, out_height, out_width;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FastDivide by_stride_h, by_stride_w, by_height, by_width;  // height and width of out
  bool relu;
  Prologue prologue;

  HOST_DEVICE int pixels() const { return images * out_height * out_width; }
};

// The source row of tap r for output row i, or -1: the forward pass multiplies, the gradient divides by the
// stride.
template <bool kGradient>
HOST_DEVICE int source_row(int i, int r, int stride, const FastDivide& by_stride, int pad, int dilation,
                           int extent) {
  int at;
  if constexpr (kGradient) {
    const int reach = i + pad - r * dilation;
    at = static_cast<int>(by_stride.quotient(static_cast<uint32_t>(reach)));
    if (reach < 0 || at * stride != reach) return -1;
  } else {
    at = i * stride + r * dilation - pad;
  }
  return inside(at, extent) ? at : -1;
}

inline Windows windows_of(const Conv2dParams& p, int64_t out_height, int64_t out_width) {
  Windows w{};
  w.out_height = int(out_height), w.out_width = int(out_width);
  w.by_height = FastDivide::by(out_height), w.by_width = FastDivide::by(out_width);
  w.by_stride_h = FastDivide::by(p.stride_h), w.by_stride_w = FastDivide::by(p.stride_w);
  w.weight = p.weight;
  w.images = int(p.N), w.R = int(p.R), w.S = int(p.S);
  w.stride_h = int(p.stride_h), w.stride_w = int(p.stride_w);
  w.pad_h = int(p.pad_h), w.pad_w = int(p.pad_w);
  w.dilation_h = int(p.dilation_h), w.dilation_w = int(p.dilation_w);
  return w;
}

// Also the weight gradient's, which reads dy beside it.
inline Windows forward_windows(const Conv2dParams& p) {
  Windows w = windows_of(p, p.P, p.Q);
  w.source = p.x, w.source_pixel = p.x_pixel, w.source_height = int(p.H), w.source_width = int(p.W);
  w.inputs = int(p.C), w.outputs = int(p.K);
  w.out = p.y, w.out_pixel = p.y_pixel;
  w.bias = p.bias, w.residual = p.residual, w.residual_pixel = p.residual_pixel, w.relu = p.relu;
  w.prologue = {p.in_scale, p.in_shift, p.in_relu};
  return w;
}

inline Windows input_grad_windows(const Conv2dParams& p) {
  Windows w = windows_of(p, p.H, p.W);
  w.source = p.dy, w.source_pixel = p.y_pixel, w.source_height = int(p.P), w.source_width = int(p.Q);
  w.inputs = int(p.K), w.outputs = int(p.C);
  w.out = p.dx, w.out_pixel = p.x_pixel;
  return w;
}

}  // namespace cuda_cnn::cuda::conv2d
