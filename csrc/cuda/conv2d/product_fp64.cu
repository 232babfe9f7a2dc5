// float64 is there for gradient checks: one instance each.
#include "cuda/conv2d/product_launch.cuh"

namespace cuda_cnn::cuda::conv2d {

template <>
void correlate_product<double>(const Correlation& p, const Plan&, Stream stream) {
  start<CorrelateFma<double, 64, 64>, Load::kScalar>(p, stream);
}

template <>
void weight_gradient_product<double>(const WeightGradient& p, const Plan&, Stream stream) {
  start<GradientFma<double, 64, 64>, Load::kScalar>(p, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
