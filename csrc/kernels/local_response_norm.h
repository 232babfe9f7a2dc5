// Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3), torch's parameters:
//
//   s_c = k + α/n · Σ_{j = c−⌊n/2⌋}^{c+⌊(n−1)/2⌋} x_j²        y_c = x_c · s_c^−β
//   dx_c = dy_c · s_c^−β − 2αβ/n · x_c · Σ_j dy_j · x_j · s_j^(−β−1)     over the j whose window holds c
#pragma once

#include <cmath>

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

// x as [outer][channels][inner]: channels_last has inner = 1, contiguous has inner = H·W.
struct LocalResponseNormParams {
  const void* x;
  const void* dy;  // backward only
  void* out;       // y, or dx
  DType dtype;
  int64_t outer, channels, inner;
  int64_t size;
  double alpha, beta, k;
};

HOST_DEVICE int64_t lrn_before(int64_t size) { return size / 2; }
HOST_DEVICE int64_t lrn_after(int64_t size) { return (size - 1) / 2; }

// s^−β. β = 3/4 needs no logarithm: s^−¾ = 1 / (√s · √√s).
template <class T>
HOST_DEVICE T lrn_inverse_power(T s, T beta) {
  if (beta == T(0.75)) {
    const T root = sqrt(s);
    return T(1) / (root * sqrt(root));
  }
  return pow(s, -beta);
}

namespace cuda {
void local_response_norm_forward(const LocalResponseNormParams&, Stream);
void local_response_norm_backward(const LocalResponseNormParams&, Stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(local_response_norm_forward, LocalResponseNormParams)
CUDA_CNN_CPU_KERNEL(local_response_norm_backward, LocalResponseNormParams)
