#include "kernels/batch_norm.h"

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr const char* kOp = "batch_norm";

// torch's results are contiguous where x is, else channels_last where x is that, though its strides alone may
// suggest otherwise where an extent is 1.
at::MemoryFormat format_of_results(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  return x.dim() == 4 && x.is_contiguous(kLast) ? kLast : format_of(x);
}

BatchNormShape shape_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t spatial = c10::multiply_integers(x.sizes().slice(2));
  // (N, C) alone: the rows of channels_last.
  return {x.size(0), x.size(1), spatial, is_channels_last(format) || spatial == 1, dtype_of(x)};
}

int64_t channels_of(const at::Tensor& x) { return x.dim() >= 2 ? x.size(1) : 0; }

// A vector with one value a channel, as the kernel takes it: contiguous, of any element type.
at::Tensor channel_values(const OptionalTensor& values) {
  if (!values) return {};
  return values->dim() == 1 && values->is_contiguous() ? *values : values->reshape({-1}).contiguous();
}
ChannelVector channel_vector(const at::Tensor& values) {
  if (!values.defined()) return {nullptr, DType::kFloat32};
  return {data(values), dtype_of(values)};
}
MutableChannelVector mutable_channel_vector(const at::Tensor& values) {
  if (values.numel() == 0) return {nullptr, DType::kFloat32};
  return {mutable_data(values), dtype_of(values)};
}

// torch takes parameters and statistics of the input's dtype, or of float32 beside a 16-bit input.
void check_channel_values(const char* name, const OptionalTensor& values, const at::Tensor& x,
                          bool any_dtype) {
  if (!values) return;
  check_tensor(kOp, name, *values);
  TORCH_CHECK(values->device() == x.device(), kOp, ": expected ", name, " on ", x.device(),
              " like input, got ", values->device());
  TORCH_CHECK(values->numel() == channels_of(x), kOp, ": expected ", name, " of ", channels_of(x),
              " elements, one for each channel, got ", values->numel(), " (shape ", values->sizes(), ")");
  TORCH_CHECK(any_dtype || values->scalar_type() == x.scalar_type() ||
                  (values->scalar_type() == at::kFloat && x.element_size() == 2),
              kOp, ": expected ", name, " of dtype ", x.scalar_type(),
              x.element_size() == 2 ? " like input, or Float" : " like input", ", got ",
              values->scalar_type());
}

// Where the CUDA kernels keep partial sums; the CPU's have scratch memory of their own.
at::Tensor workspace_for([[maybe_unused]] const BatchNormShape& shape, [[maybe_unused]] const at::Tensor& x) {
#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
  if (uses_cuda_kernels(x)) {
    return at::empty({cuda::batch_norm_workspace_bytes(shape)}, x.options().dtype(at::kByte));
  }
#endif
  return {};
}

void check_input(const at::Tensor& x) {
  check_tensor(kOp, "input", x);
  TORCH_CHECK_INDEX(x.dim() >= 2 || x.numel() == 0, kOp, ": expected input of 2 or more dimensions, got ",
                    x.dim(), " (shape ", x.sizes(), ")");
}

void check_same(const char* name, const at::Tensor& other, const at::Tensor& x) {
  check_like(kOp, name, other, x);
  check_same_shape(kOp, name, other, x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const OptionalTensor& residual,
                                                          const OptionalTensor& weight,
                                                          const OptionalTensor& bias,
                                                          const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training,
                                                          double eps, bool relu) {
  check_input(x);
  if (residual) check_same("residual", *residual, x);
  check_channel_values("weight", weight, x, false);
  check_channel_values("bias", bias, x, false);
  check_channel_values("running_mean", running_mean, x, false);
  check_channel_values("running_var", running_var, x, false);
  TORCH_CHECK(training || running_mean, kOp, ": running_mean must be defined in evaluation mode");
  TORCH_CHECK(training || running_var, kOp, ": running_var must be defined in evaluation mode");

  const at::MemoryFormat format = format_of_results(x);
  at::Tensor y = empty_result(x.sizes(), x.options().memory_format(format));
  at::Tensor mean = at::empty({training ? channels_of(x) : 0}, x.options().dtype(at::kDouble));
  at::Tensor var = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), var.zero_()};

  const at::Tensor input = x.contiguous(format);
  const at::Tensor added = residual ? residual->contiguous(format) : at::Tensor();
  const at::Tensor weights = channel_values(weight), biases = channel_values(bias);
  const at::Tensor means = channel_values(running_mean), vars = channel_values(running_var);
  BatchNormParams p{};
  p.x = data(input);
  p.residual = residual ? data(added) : nullptr;
  p.y = mutable_data(y);
  p.weight = channel_vector(weights);
  p.bias = channel_vector(biases);
  p.running_mean = channel_vector(means);
  p.running_var = channel_vector(vars);
  p.mean = mean.mutable_data_ptr<double>();
  p.var = var.mutable_data_ptr<double>();
  p.shape = shape_of(x, format);
  p.eps = eps;
  p.training = training;
  p.relu = relu;
  const at::Tensor workspace = workspace_for(p.shape, x);
  p.workspace = workspace.defined() ? mutable_data(workspace) : nullptr;
  CUDA_CNN_LAUNCH(x, batch_norm_forward, p);
  return {y, mean, var};
}

// A result that is wanted has the shape and dtype of `like`; one that is not has no elements.
at::Tensor wanted(bool want, const at::Tensor& like, const at::TensorOptions& options) {
  return want ? empty_result(like.sizes(), options)
              : empty_result({0}, options.memory_format(at::MemoryFormat::Contiguous));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& var, bool training, double eps,
    bool relu, std::array<bool, 3> wants) {
  check_input(x);
  check_same("grad_output", dy, x);
  if (y) check_same("output", *y, x);
  check_channel_values("weight", weight, x, false);
  check_channel_values("bias", bias, x, false);
  check_channel_values("mean", mean, x, true);
  check_channel_values("var", var, x, true);
  const bool want_dx = wants[0], want_dparameters = wants[1], want_dresidual = wants[2];

  const at::MemoryFormat format = format_of_results(x);
  const at::TensorOptions dense = x.options().memory_format(format);
  const at::TensorOptions parameter = weight ? weight->options() : bias ? bias->options() : mean.options();
  at::Tensor dx = wanted(want_dx, x, dense), dresidual = wanted(want_dresidual, x, dense);
  at::Tensor dweight = wanted(want_dparameters, mean, parameter),
             dbias = wanted(want_dparameters, mean, parameter);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_(), dresidual};

  const at::Tensor grad = dy.contiguous(format), input = x.contiguous(format);
  const at::Tensor output = y ? y->contiguous(format) : at::Tensor();
  const at::Tensor weights = channel_values(weight), biases = channel_values(bias);
  const at::Tensor means = channel_values(mean), vars = channel_values(var);
  BatchNormBackwardParams p{};
  p.dy = data(grad);
  p.x = data(input);
  p.y = y ? data(output) : nullptr;
  p.dx = want_dx ? mutable_data(dx) : nullptr;
  p.dresidual = want_dresidual ? mutable_data(dresidual) : nullptr;
  p.weight = channel_vector(weights);
  p.bias = channel_vector(biases);
  p.mean = channel_vector(means);
  p.var = channel_vector(vars);
  p.dweight = mutable_channel_vector(dweight);
  p.dbias = mutable_channel_vector(dbias);
  p.shape = shape_of(x, format);
  p.eps = eps;
  p.training = training;
  p.relu = relu;
  const at::Tensor workspace = workspace_for(p.shape, x);
  p.workspace = workspace.defined() ? mutable_data(workspace) : nullptr;
  CUDA_CNN_LAUNCH(x, batch_norm_backward, p);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(library,
         "batch_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
         "Tensor? running_var, bool training, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor var)",
         &batch_norm);
  define(library,
         "batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
         "Tensor var, "
         "bool training, float eps, bool relu, bool[3] wants) -> "
         "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
         &batch_norm_backward);
}

}  // namespace cuda_cnn::ops
