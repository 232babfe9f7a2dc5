// Batch normalisation (Ioffe & Szegedy, 2015), with an optional residual and ReLU:
//   y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)
// training: mean and biased variance of the batch, over all but dimension 1; else they are given.
//
// Arithmetic on single channels is in double on both devices, and the batch's statistics are handed from the
// forward to the backward pass as doubles: so the backward pass finds, bit for bit, the ReLU's mask again.
#pragma once

#include <cmath>

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

// A vector with one value a channel, of any element type; data may be null.
struct ChannelVector {
  const void* data;
  DType dtype;

  HOST_DEVICE double at(int64_t c, double if_null) const {
    if (!data) return if_null;
    switch (dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(data)[c];
      case DType::kFloat64:
        return static_cast<const double*>(data)[c];
      case DType::kBFloat16:
        return to_float(static_cast<const BFloat16*>(data)[c]);
      case DType::kFloat16:
        return to_float(static_cast<const Half*>(data)[c]);
    }
    return if_null;
  }
};

struct MutableChannelVector {
  void* data;
  DType dtype;

  HOST_DEVICE void set(int64_t c, double value) const {
    if (!data) return;
    switch (dtype) {
      case DType::kFloat32:
        static_cast<float*>(data)[c] = static_cast<float>(value);
        return;
      case DType::kFloat64:
        static_cast<double*>(data)[c] = value;
        return;
      case DType::kBFloat16:
        static_cast<BFloat16*>(data)[c] = to_bfloat16(static_cast<float>(value));
        return;
      case DType::kFloat16:
        static_cast<Half*>(data)[c] = to_half(static_cast<float>(value));
        return;
    }
  }
};

// Element (n, c, s) lies at (n * channels + c) * spatial + s, or with channels_last at
// (n * spatial + s) * channels + c.
struct BatchNormShape {
  int64_t batch, channels, spatial;
  bool channels_last;
  DType dtype;

  HOST_DEVICE int64_t per_channel() const { return batch * spatial; }
};

struct BatchNormParams {
  const void* x;
  const void* residual;  // null: none
  void* y;
  ChannelVector weight, bias;               // null: 1 and 0
  ChannelVector running_mean, running_var;  // read unless training
  double *mean, *var;                       // [channels], written when training
  BatchNormShape shape;
  double eps;
  bool training, relu;
  void* workspace;  // CUDA: batch_norm_workspace_bytes, from torch's allocator
};

struct BatchNormBackwardParams {
  const void* dy;
  const void* x;
  const void* y;    // gives the ReLU's mask where there was a residual; null: the mask is recomputed from x
  void* dx;         // null: not wanted
  void* dresidual;  // dy under the mask; null: not wanted
  ChannelVector weight, bias;
  ChannelVector mean, var;  // doubles of the forward pass when training, else the running statistics
  MutableChannelVector dweight, dbias;  // null: not wanted
  BatchNormShape shape;
  double eps;
  bool training, relu;
  void* workspace;  // CUDA: batch_norm_workspace_bytes, from torch's allocator
};

// y = relu((x - mean) * scale + shift + residual) in the accumulation type A. Taking x - mean first keeps the
// accuracy where |mean| is large beside the deviation; shift carries what rounding took from the mean.
template <class A>
struct BatchNormMap {
  A mean, scale, shift;
};

template <class A>
HOST_DEVICE BatchNormMap<A> batch_norm_map(double mean, double var, double weight, double bias, double eps) {
  const A rounded_mean = static_cast<A>(mean);
  const double scale = weight / sqrt(var + eps);
  return {rounded_mean, static_cast<A>(scale), static_cast<A>(bias - (mean - rounded_mean) * scale)};
}

// dx = scale * g + slope * (x - mean) + offset, where g is dy under the ReLU's mask and mean is the map's:
//   dweight = sum(g * (x - mean)) / sqrt(var + eps), dbias = sum(g)
//   dx = scale * (g - sum(g) / M - (x - mean) / (var + eps) * sum(g * (x - mean)) / M)   in training
//   dx = scale * g                                                                       else
template <class A>
struct BatchNormGradient {
  A scale, slope, offset;
  double dweight, dbias;
};

// sum_g = sum(g) and sum_gx = sum(g * (x - A(mean))) over the channel's `count` elements.
template <class A>
HOST_DEVICE BatchNormGradient<A> batch_norm_gradient(double sum_g, double sum_gx, double mean, double var,
                                                     double weight, double eps, int64_t count,
                                                     bool training) {
  const double lost = mean - static_cast<A>(mean);
  const double inverse_std = 1 / sqrt(var + eps);
  const double centred = sum_gx - lost * sum_g;
  const double scale = weight * inverse_std, share = 1.0 / count;
  const double slope = training ? -scale * inverse_std * inverse_std * centred * share : 0;
  const double offset = training ? -scale * sum_g * share - slope * lost : 0;
  return {static_cast<A>(scale), static_cast<A>(slope), static_cast<A>(offset), centred * inverse_std, sum_g};
}

namespace cuda {
int64_t batch_norm_workspace_bytes(const BatchNormShape&);
void batch_norm_forward(const BatchNormParams&, Stream);
void batch_norm_backward(const BatchNormBackwardParams&, Stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(batch_norm_forward, BatchNormParams)
CUDA_CNN_CPU_KERNEL(batch_norm_backward, BatchNormBackwardParams)
