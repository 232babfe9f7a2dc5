#include "cuda/conv2d/product_launch.cuh"

namespace cuda_cnn::cuda::conv2d {

template <>
void correlate_product<Half>(const Correlation& p, const Plan& plan, Stream stream) {
  correlate_tensor_cores<Half>(p, plan, stream);
}

template <>
void weight_gradient_product<Half>(const WeightGradient& p, const Plan& plan, Stream stream) {
  weight_gradient_tensor_cores<Half>(p, plan, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
