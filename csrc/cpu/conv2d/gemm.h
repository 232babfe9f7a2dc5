// Convolution as a blocked matrix product that never writes its matrix to memory: see gemm.cpp.
#pragma once

#include "cpu/conv2d/filters.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Where the row of a position goes: pixel (n, first_h + p*step_h, first_w + q*step_w) of an NHWC image H x W.
template <class T>
struct Scatter {
  T* out;
  int64_t H, W, pixel;
  int64_t first_h = 0, first_w = 0, step_h = 1, step_w = 1;
  const T* bias = nullptr;      // a value a channel
  const T* residual = nullptr;  // as out, pixels residual_pixel apart
  int64_t residual_pixel = 0;
  bool relu = false;
};

// The input gradient's phase (h, w): a correlation of stride 1 over dy.
template <class T>
Gather<T> phase_gather(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  return {static_cast<const T*>(p.dy),
          p.P,
          p.Q,
          p.y_pixel,
          h.count,
          w.count,
          1,
          1,
          h.base - (h.taps - 1) * h.dy_step,
          w.base - (w.taps - 1) * w.dy_step,
          h.taps,
          w.taps,
          h.dy_step,
          w.dy_step,
          p.K / p.groups};
}

template <class T>
Scatter<T> phase_scatter(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  return {static_cast<T*>(p.dx), p.H, p.W, p.x_pixel, h.first, w.first, p.stride_h, p.stride_w};
}

// out = matrix(gather) * filters for each of `groups`: N*P*Q positions, filters.columns() channels a group.
// Group g reads channels from g * gather.channels on.
template <class T, class E>
void correlate(const Gather<T>& gather, const Scatter<T>& scatter, const Filters<T, E>& filters, int64_t N,
               int64_t groups);

// The same for one group of few channels whose taps are neighbours along a row (few_channels_forward.cpp);
// out is `linear` and there is no residual.
template <class T>
void correlate_few_channels(const Gather<T>& gather, const Scatter<T>& scatter, const Filters<T>& filters,
                            int64_t N);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
