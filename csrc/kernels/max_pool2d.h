// Max-pooling: y[n,c,p,q] = max over (r,s) of x[n,c,i,j],
//   i = p·stride_h − pad_h + r·dilation_h,  j = q·stride_w − pad_w + s·dilation_w.
//
// A window's *tap* is the number of its arg-max cell, r·kernel_w + s: one byte where the window has at most
// 255 cells, int32 elsewhere. It is all that the gradient needs. Ties go to the first cell in scan order, NaN
// to the last NaN, as in torch; a window without a greater cell (all −inf) has its first cell inside the
// plane.
#pragma once

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

constexpr int64_t kMaxByteTaps = 255;

struct PoolAxis {
  int64_t in;
  int64_t out;
  int64_t kernel;
  int64_t stride;
  int64_t pad;
  int64_t dilation;
};

// input and output are dense NCHW, or NHWC where channels_last; taps and indices lie as the pooled tensor
// does.
//   max_pool2d           input x                  output y            writes taps, indices
//   max_pool2d_backward  input dy                 output dx           reads taps
//   max_pool2d_gather    input shaped as x (ddx)  output as y (ddy)   reads taps
struct MaxPool2dParams {
  const void* input;
  void* output;
  void* taps;        // uint8_t, or int32_t if wide_taps; the forward pass may have null: not wanted
  int64_t* indices;  // forward only, beside taps: position in the H·W plane, as torch counts it; or null
  int64_t batch;
  int64_t channels;
  PoolAxis h;
  PoolAxis w;
  bool channels_last;
  bool wide_taps;
  DType dtype;
};

// The output's length along one axis, as torch has it: with ceil_mode a last, partial window counts only if
// it starts inside the input or the left padding.
inline int64_t pooled_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                           bool ceil_mode) {
  const int64_t last_start = in + 2 * pad - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  const int64_t windows = (last_start >= 0 ? last_start / stride : -ceil_div(-last_start, stride)) + 1;
  return ceil_mode && (windows - 1) * stride >= in + pad ? windows - 1 : windows;
}

template <class T>
HOST_DEVICE bool takes_over(T value, T best) {
  return value > best || value != value;
}

// Where window `out` begins; negative in the padding.
HOST_DEVICE int64_t window_start(const PoolAxis& a, int64_t out) { return out * a.stride - a.pad; }

// The first r whose cell is not before the plane.
HOST_DEVICE int64_t first_tap(const PoolAxis& a, int64_t out) {
  const int64_t start = window_start(a, out);
  return start >= 0 ? 0 : ceil_div(-start, a.dilation);
}

// One past the last r whose cell is not behind the plane.
HOST_DEVICE int64_t end_tap(const PoolAxis& a, int64_t out) {
  const int64_t room = a.in - window_start(a, out);
  return room <= 0 ? 0 : min64(a.kernel, ceil_div(room, a.dilation));
}

// The windows that may hold cell `in`: [first_window, end_window). Window p holds it as r = tap_of(p), if >=
// 0.
HOST_DEVICE int64_t first_window(const PoolAxis& a, int64_t in) {
  const int64_t reach = in + a.pad - (a.kernel - 1) * a.dilation;
  return reach <= 0 ? 0 : ceil_div(reach, a.stride);
}
HOST_DEVICE int64_t end_window(const PoolAxis& a, int64_t in) {
  return min64(a.out, (in + a.pad) / a.stride + 1);
}
HOST_DEVICE int64_t tap_of(const PoolAxis& a, int64_t in, int64_t out) {
  const int64_t offset = in - window_start(a, out);
  return offset % a.dilation == 0 ? offset / a.dilation : -1;
}

// Position in the plane of the cell that `tap` names.
HOST_DEVICE int64_t tap_index(const PoolAxis& h, const PoolAxis& w, int64_t p, int64_t q, int64_t tap) {
  const int64_t row = window_start(h, p) + tap / w.kernel * h.dilation;
  const int64_t column = window_start(w, q) + tap % w.kernel * w.dilation;
  return row * w.in + column;
}

namespace cuda {
void max_pool2d(const MaxPool2dParams& params, Stream stream);
void max_pool2d_backward(const MaxPool2dParams& params, Stream stream);
void max_pool2d_gather(const MaxPool2dParams& params, Stream stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(max_pool2d, MaxPool2dParams)
CUDA_CNN_CPU_KERNEL(max_pool2d_backward, MaxPool2dParams)
CUDA_CNN_CPU_KERNEL(max_pool2d_gather, MaxPool2dParams)
