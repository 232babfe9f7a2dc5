// Which algorithm a convolution takes. Pure: the answer depends on the parameters alone.
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu {
namespace {

// Fastest first; the last one takes everything.
constexpr Conv2dAlgorithm kOrder[] = {Conv2dAlgorithm::kWinograd, Conv2dAlgorithm::kDepthwise,
                                      Conv2dAlgorithm::kGemm, Conv2dAlgorithm::kReference};

bool empty_sum(Conv2dDirection direction, const Conv2dParams& p) {
  switch (direction) {
    case Conv2dDirection::kForward:
      return p.R * p.S * p.C == 0;
    case Conv2dDirection::kInputGrad:
      return p.R * p.S * p.K == 0 || p.P * p.Q == 0;
    case Conv2dDirection::kWeightGrad:
      return p.N * p.P * p.Q == 0;
  }
  return true;
}

// Whether the algorithm can compute this at all.
bool applies(Conv2dAlgorithm algorithm, Conv2dDirection direction, const Conv2dParams& p) {
  switch (algorithm) {
    case Conv2dAlgorithm::kWinograd:
      return p.dtype == DType::kFloat32 && p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 &&
             p.dilation_h == 1 && p.dilation_w == 1 && !empty_sum(direction, p);
    case Conv2dAlgorithm::kDepthwise:
      return p.groups == p.C && p.K == p.C && !p.in_scale && !p.in_relu && !empty_sum(direction, p);
    case Conv2dAlgorithm::kGemm:
      return !empty_sum(direction, p);
    case Conv2dAlgorithm::kReference:
      return true;
    default:
      return false;
  }
}

// Whether it is the fastest of those from here on.
bool worthwhile(Conv2dAlgorithm algorithm, Conv2dDirection, const Conv2dParams& p) {
  if (algorithm != Conv2dAlgorithm::kWinograd) return true;
  // The transforms cost as much as some ten channels' products, and tiles of 4x4 must not be mostly edge.
  return p.allow_winograd && p.C / p.groups >= 16 && p.K / p.groups >= 16 && p.P >= 4 && p.Q >= 4;
}

}  // namespace

Conv2dAlgorithm conv2d_choose(Conv2dDirection direction, const Conv2dParams& params) {
  if (params.algorithm != Conv2dAlgorithm::kAuto && applies(params.algorithm, direction, params)) {
    return params.algorithm;
  }
  for (Conv2dAlgorithm algorithm : kOrder) {
    if (applies(algorithm, direction, params) && worthwhile(algorithm, direction, params)) return algorithm;
  }
  return Conv2dAlgorithm::kReference;
}

const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::kAuto:
      return "auto";
    case Conv2dAlgorithm::kWinograd:
      return "winograd";
    case Conv2dAlgorithm::kDepthwise:
      return "depthwise";
    case Conv2dAlgorithm::kGemm:
      return "gemm";
    case Conv2dAlgorithm::kReference:
      return "reference";
  }
  return "unknown";
}

}  // namespace cuda_cnn::cpu
