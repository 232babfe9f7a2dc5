// The three launchers: the algorithm that conv2d_choose names, for the element type.
#include "cpu/conv2d/algorithms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// A filter as large as its image (LeNet-5's C5, a classifier as a convolution) is a 1x1 one on R*S*C
// channels.
Conv2dParams flattened(const Conv2dParams& params) {
  Conv2dParams p = params;
  const bool covers = p.P == 1 && p.Q == 1 && p.R == p.H && p.S == p.W && p.pad_h == 0 && p.pad_w == 0 &&
                      p.dilation_h == 1 && p.dilation_w == 1 && p.groups == 1 && p.x_pixel == p.C &&
                      !p.in_scale && !p.nchw;
  if (!covers) return p;
  p.C = p.x_pixel = p.R * p.S * p.C;
  p.H = p.W = p.R = p.S = 1;
  p.stride_h = p.stride_w = 1;
  return p;
}

}  // namespace

void conv2d_forward(const Conv2dParams& unflattened) {
  const Conv2dParams params = flattened(unflattened);
  if (params.N * params.P * params.Q * params.K == 0) return;
  const Conv2dAlgorithm algorithm = conv2d_choose(Conv2dDirection::kForward, params);
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    switch (algorithm) {
      case Conv2dAlgorithm::kWinograd:
        forward_winograd(params);
        break;
      case Conv2dAlgorithm::kDepthwise:
        forward_depthwise<T>(params);
        break;
      case Conv2dAlgorithm::kGemm:
        forward_gemm<T>(params);
        break;
      case Conv2dAlgorithm::kGemmNchw:
        forward_gemm_nchw<T>(params);
        break;
      default:
        forward_reference<T>(params);
    }
    if (params.mean) output_statistics<T>(params);
  });
}

void conv2d_input_grad(const Conv2dParams& unflattened) {
  const Conv2dParams params = flattened(unflattened);
  if (params.N * params.H * params.W * params.C == 0) return;
  const Conv2dAlgorithm algorithm = conv2d_choose(Conv2dDirection::kInputGrad, params);
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    switch (algorithm) {
      case Conv2dAlgorithm::kWinograd:
        return input_grad_winograd(params);
      case Conv2dAlgorithm::kDepthwise:
        return input_grad_depthwise<T>(params);
      case Conv2dAlgorithm::kGemm:
        return input_grad_gemm<T>(params);
      case Conv2dAlgorithm::kGemmNchw:
        return input_grad_gemm_nchw<T>(params);
      default:
        return input_grad_reference<T>(params);
    }
  });
}

void conv2d_weight_grad(const Conv2dParams& unflattened) {
  const Conv2dParams params = flattened(unflattened);
  const Conv2dAlgorithm algorithm = conv2d_choose(Conv2dDirection::kWeightGrad, params);
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.dbias && params.K) bias_grad<T>(params);
    if (!params.dweight || params.K * params.R * params.S * params.C == 0) return;
    switch (algorithm) {
      case Conv2dAlgorithm::kWinograd:
        return weight_grad_winograd(params);
      case Conv2dAlgorithm::kDepthwise:
        return weight_grad_depthwise<T>(params);
      case Conv2dAlgorithm::kGemm:
      case Conv2dAlgorithm::kGemmNchw:
        return weight_grad_gemm<T>(params);
      default:
        return weight_grad_reference<T>(params);
    }
  });
}

void conv2d_statistics(const Conv2dParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { output_statistics<decltype(type)>(params); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
