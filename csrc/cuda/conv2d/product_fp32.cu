// float32: TF32 on tensor cores where the user allows it, else strict multiply-add. The strict form has one
// tile, 8 x 8 sums a thread, and one load through registers, which takes a prologue.
#include "cuda/conv2d/product_launch.cuh"

namespace cuda_cnn::cuda::conv2d {

template <>
void correlate_product<float>(const Correlation& p, const Plan& plan, Stream stream) {
  if (plan.tensor_cores) return correlate_tensor_cores<float>(p, plan, stream);
  if (plan.load == Load::kAsync) return start<CorrelateFma<float, 128, 64>, Load::kAsync>(p, stream);
  start<CorrelateFma<float, 128, 64>, Load::kScalar>(p, stream);
}

template <>
void weight_gradient_product<float>(const WeightGradient& p, const Plan& plan, Stream stream) {
  if (plan.tensor_cores) return weight_gradient_tensor_cores<float>(p, plan, stream);
  if (plan.load == Load::kAsync) return start<GradientFma<float, 128, 64>, Load::kAsync>(p, stream);
  start<GradientFma<float, 128, 64>, Load::kScalar>(p, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
