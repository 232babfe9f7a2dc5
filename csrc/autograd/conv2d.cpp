// The convolution and its three gradients are each other's derivatives.
#include "autograd/autocast.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

Geometry geometry_of(SymInts stride, SymInts padding, SymInts dilation, const c10::SymInt& groups) {
  return {pair("conv2d", "stride", stride), pair("conv2d", "padding", padding),
          pair("conv2d", "dilation", dilation), groups};
}

struct Conv2dBackward : Formula {
  static constexpr const char* kName = "Conv2dBackward";
  Geometry geometry;
  bool channels_last;

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.grads[0], &x = of.saved[0], &weight = of.saved[1];
    variable_list result(3);
    if (!dy.defined()) return result;
    if (of.wanted(0)) result[0] = conv2d_input_grad(dy, weight, x.sym_sizes(), geometry, channels_last);
    if (of.wanted(1)) result[1] = conv2d_weight_grad(dy, x, weight.sym_sizes(), geometry, channels_last);
    if (of.wanted(2)) result[2] = conv2d_bias_grad(dy);
    return result;
  }
};

// Bilinear in (dy, weight).
struct Conv2dInputGradBackward : Formula {
  static constexpr const char* kName = "Conv2dInputGradBackward";
  Geometry geometry;
  bool channels_last;

  variable_list operator()(const Derivative& of) const {
    const Tensor &gg = of.grads[0], &dy = of.saved[0], &weight = of.saved[1];
    variable_list result(2);
    if (!gg.defined()) return result;
    if (of.wanted(0)) result[0] = conv2d(gg, weight, {}, geometry);
    if (of.wanted(1)) result[1] = conv2d_weight_grad(dy, gg, weight.sym_sizes(), geometry, channels_last);
    return result;
  }
};

// Bilinear in (dy, x).
struct Conv2dWeightGradBackward : Formula {
  static constexpr const char* kName = "Conv2dWeightGradBackward";
  Geometry geometry;
  bool channels_last;

  variable_list operator()(const Derivative& of) const {
    const Tensor &gg = of.grads[0], &dy = of.saved[0], &x = of.saved[1];
    variable_list result(2);
    if (!gg.defined()) return result;
    if (of.wanted(0)) result[0] = conv2d(x, gg, {}, geometry);
    if (of.wanted(1)) result[1] = conv2d_input_grad(dy, gg, x.sym_sizes(), geometry, channels_last);
    return result;
  }
};

struct Conv2dBiasGradBackward : Formula {
  static constexpr const char* kName = "Conv2dBiasGradBackward";
  std::vector<c10::SymInt> shape;

  variable_list operator()(const Derivative& of) const {
    const Tensor& gg = of.grads[0];
    return {gg.defined() ? gg.view({-1, 1, 1}).expand_symint(shape) : Tensor()};
  }
};

Tensor conv2d_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymInts stride,
                       SymInts padding, SymInts dilation, c10::SymInt groups) {
  const Geometry geometry = geometry_of(stride, padding, dilation, groups);
  return record<Conv2dBackward>(
      "conv2d", [&] { return conv2d(x, weight, bias, geometry); },
      [&](auto& node, const Tensor& y) {
        node.save({x, weight});
        node.formula.geometry = geometry;
        node.formula.channels_last = y.sym_stride(1) == 1 && !y.is_contiguous();
      },
      x, weight, bias);
}

Tensor conv2d_input_grad_autograd(const Tensor& dy, const Tensor& weight, SymInts input_size, SymInts stride,
                                  SymInts padding, SymInts dilation, c10::SymInt groups, bool channels_last) {
  const Geometry geometry = geometry_of(stride, padding, dilation, groups);
  return record<Conv2dInputGradBackward>(
      "conv2d_input_grad", [&] { return conv2d_input_grad(dy, weight, input_size, geometry, channels_last); },
      [&](auto& node, const Tensor&) {
        node.save({dy, weight});
        node.formula.geometry = geometry;
        node.formula.channels_last = channels_last;
      },
      dy, weight);
}

Tensor conv2d_weight_grad_autograd(const Tensor& dy, const Tensor& x, SymInts weight_size, SymInts stride,
                                   SymInts padding, SymInts dilation, c10::SymInt groups,
                                   bool channels_last) {
  const Geometry geometry = geometry_of(stride, padding, dilation, groups);
  return record<Conv2dWeightGradBackward>(
      "conv2d_weight_grad", [&] { return conv2d_weight_grad(dy, x, weight_size, geometry, channels_last); },
      [&](auto& node, const Tensor&) {
        node.save({dy, x});
        node.formula.geometry = geometry;
        node.formula.channels_last = channels_last;
      },
      dy, x);
}

Tensor conv2d_bias_grad_autograd(const Tensor& dy) {
  return record<Conv2dBiasGradBackward>(
      "conv2d_bias_grad", [&] { return conv2d_bias_grad(dy); },
      [&](auto& node, const Tensor&) { node.formula.shape = dy.sym_sizes().vec(); }, dy);
}

template <c10::DeviceType kDevice>
Tensor conv2d_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymInts stride,
                       SymInts padding, SymInts dilation, c10::SymInt groups) {
  const Autocast<kDevice> cast;
  return conv2d(cast(x), cast(weight), cast(bias), geometry_of(stride, padding, dilation, groups));
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("conv2d", &conv2d_autograd);
  library.impl("conv2d_input_grad", &conv2d_input_grad_autograd);
  library.impl("conv2d_weight_grad", &conv2d_weight_grad_autograd);
  library.impl("conv2d_bias_grad", &conv2d_bias_grad_autograd);
}
TORCH_LIBRARY_IMPL(cuda_cnn, AutocastCPU, library) { library.impl("conv2d", &conv2d_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(cuda_cnn, AutocastCUDA, library) { library.impl("conv2d", &conv2d_autocast<at::kCUDA>); }

}  // namespace cuda_cnn::autograd
