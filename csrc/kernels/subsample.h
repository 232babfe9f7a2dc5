// LeNet-5's sub-sampling (LeCun et al. 1998, section II.B): windows tile the plane, cells beyond the last
// whole window are left out.
//   a[n,c,p,q] = coefficient[c] · Σ window + bias[c],   y = squash(a)
//   da = dy · squash'(a), which y alone gives;   dx = coefficient[c] · da on every cell of the window
//   dcoefficient[c] = Σ da · Σ window,   dbias[c] = Σ da
#pragma once

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

enum class Squash : int32_t { kNone, kTanh, kSigmoid };

// The two channel sums are taken by bands of this many output rows of one image, then over bands in index
// order: the same bits for any number of threads.
constexpr int64_t kSubsampleBand = 8;

// x, y, dy, dx are dense NCHW, or NHWC where channels_last; coefficient and bias have C elements of the same
// dtype.
struct SubsampleParams {
  const void* x;
  const void* coefficient;
  const void* bias;  // forward only
  void* y;           // backward reads it
  const void* dy;    // the rest: backward only
  void* dx;          // cells outside every window get 0
  void* dcoefficient;
  void* dbias;
  void* partial;  // scratch: subsample_bands · 2 · channels of the accumulation type
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel_h;  // also the strides
  int64_t kernel_w;
  Squash squash;
  bool channels_last;
  DType dtype;
};

inline int64_t subsample_bands(int64_t batch, int64_t out_height) {
  return batch * ceil_div(out_height, kSubsampleBand);
}

// e^z − 1 for |z| ≤ 87, to about one unit in the last place: z = n·ln2 + r, |r| ≤ ln2/2, Taylor to r^7.
// Branch-free, so that loops over it vectorise.
HOST_DEVICE float expm1_bounded(float z) {
  const float shifted = z * 1.44269504f + 12582912.0f;  // 1.5·2^23: the sum's low bits are n
  const float n = shifted - 12582912.0f;
  const float r = (z - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r;
  const float scale = bits_float((float_bits(shifted) + 127u) << 23);  // 2^n
  return scale * p + (scale - 1.0f);
}

HOST_DEVICE float tanh_of(float a) {
  const float magnitude = a < 0 ? -a : a;
  const float m = expm1_bounded(magnitude > 10.0f ? 20.0f : 2.0f * magnitude);
  const float t = m / (m + 2.0f);
  return a < 0 ? -t : t;
}
HOST_DEVICE double tanh_of(double a) { return __builtin_tanh(a); }

HOST_DEVICE float sigmoid_of(float a) {
  const float z = a > 87.0f ? -87.0f : a < -87.0f ? 87.0f : -a;
  return 1.0f / (expm1_bounded(z) + 2.0f);
}
HOST_DEVICE double sigmoid_of(double a) { return 1.0 / (1.0 + __builtin_exp(-a)); }

// The paper's amplitude A and slope: A·tanh(S·a), with S = 2/3 (appendix A).
constexpr double kSquashAmplitude = 1.7159;
constexpr double kSquashSlope = 2.0 / 3.0;

// T is float or double.
template <class T>
HOST_DEVICE T squash(T a, Squash kind) {
  if (kind == Squash::kTanh) return T(kSquashAmplitude) * tanh_of(T(kSquashSlope) * a);
  if (kind == Squash::kSigmoid) return sigmoid_of(a);
  return a;
}

// squash'(a), from y = squash(a).
template <class T>
HOST_DEVICE T squash_slope(T y, Squash kind) {
  if (kind == Squash::kTanh) return T(kSquashSlope) * (T(kSquashAmplitude) - y * y * T(1 / kSquashAmplitude));
  if (kind == Squash::kSigmoid) return y * (T(1) - y);
  return T(1);
}

namespace cuda {
void subsample(const SubsampleParams& params, Stream stream);
void subsample_backward(const SubsampleParams& params, Stream stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(subsample, SubsampleParams)
CUDA_CNN_CPU_KERNEL(subsample_backward, SubsampleParams)
