// The three launchers: the algorithm that conv2d_choose names, for the element type.
#include "cpu/conv2d/algorithms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
void conv2d_forward(const Conv2dParams& unflattened) {
  const Conv2dParams params = conv2d_flattened(unflattened);
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
      case Conv2dAlgorithm::kGemmNchw:
        forward_gemm_nchw<T>(params);
        break;
      case Conv2dAlgorithm::kFewPixels:
        forward_few_pixels<T>(params);
        break;
      case Conv2dAlgorithm::kFewChannels:
        forward_few_channels<T>(params);
        break;
      case Conv2dAlgorithm::kGemm:
        forward_gemm<T>(params);
        break;
      default:
        forward_reference<T>(params);
    }
    if (params.mean) output_statistics<T>(params);
  });
}

void conv2d_input_grad(const Conv2dParams& unflattened) {
  const Conv2dParams params = conv2d_flattened(unflattened);
  if (params.N * params.H * params.W * params.C == 0) return;
  const Conv2dAlgorithm algorithm = conv2d_choose(Conv2dDirection::kInputGrad, params);
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    switch (algorithm) {
      case Conv2dAlgorithm::kWinograd:
        return input_grad_winograd(params);
      case Conv2dAlgorithm::kDepthwise:
        return input_grad_depthwise<T>(params);
      case Conv2dAlgorithm::kGemmNchw:
        return input_grad_gemm_nchw<T>(params);
      case Conv2dAlgorithm::kFewPixels:
        return input_grad_few_pixels<T>(params);
      case Conv2dAlgorithm::kFewChannels:
        return input_grad_few_channels<T>(params);
      case Conv2dAlgorithm::kGemm:
        return input_grad_gemm<T>(params);
      default:
        return input_grad_reference<T>(params);
    }
  });
}

void conv2d_weight_grad(const Conv2dParams& unflattened) {
  const Conv2dParams params = conv2d_flattened(unflattened);
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
      case Conv2dAlgorithm::kFewChannels:
        return weight_grad_few_channels<T>(params);
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
