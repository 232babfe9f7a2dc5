#include "cuda/conv2d/product_launch.cuh"

namespace cuda_cnn::cuda::conv2d {

template <>
void correlate_product<BFloat16>(const Correlation& p, const Plan& plan, Stream stream) {
  correlate_tensor_cores<BFloat16>(p, plan, stream);
}

template <>
void weight_gradient_product<BFloat16>(const WeightGradient& p, const Plan& plan, Stream stream) {
  weight_gradient_tensor_cores<BFloat16>(p, plan, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
