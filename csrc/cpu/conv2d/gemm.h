// Convolution as a blocked matrix product that never writes its matrix to memory: see gemm.cpp.
#pragma once

#include "cpu/conv2d/pack.h"

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

// out = matrix(gather) * panels for each of `groups`: N*P*Q positions, `columns` channels a group.
// panels holds [group][panel][depth][kTileColumns]; group g reads channels from g * gather.channels on.
template <class T>
void correlate(const Gather<T>& gather, const Scatter<T>& scatter, const Accumulator<T>* panels, int64_t N,
               int64_t groups, int64_t columns);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
