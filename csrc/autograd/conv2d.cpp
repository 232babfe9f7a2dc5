// The convolution and its three gradients are each other's derivatives.
#include "autograd/autocast.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

Geometry geometry_of(SymInts stride, SymInts padding, SymInts dilation, const c10::SymInt& groups) {
  return {pair("conv2d", "stride", stride), pair("conv2d", "padding", padding),
          pair("conv2d", "dilation", dilation), groups};
}

void save_all(AutogradContext* ctx, const Tensor& a, const Tensor& b, const Geometry& geometry,
              bool channels_last) {
  ctx->save_for_backward({a, b});
  ctx->saved_data["geometry"] = geometry.values();
  ctx->saved_data["channels_last"] = channels_last;
}

struct Conv2d : Function<Conv2d, &conv2d> {
  static void save(AutogradContext* ctx, const Tensor& y, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, const Geometry& geometry) {
    save_all(ctx, x, weight, geometry, y.sym_stride(1) == 1 && !y.is_contiguous());
    ctx->saved_data["has_bias"] = bias.has_value();
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const Tensor& dy = grads[0];
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Geometry geometry(ctx->saved_data["geometry"]);
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    if (ctx->needs_input_grad(0)) {
      result[0] = conv2d_input_grad(dy, weight, x.sym_sizes(), geometry, channels_last);
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = conv2d_weight_grad(dy, x, weight.sym_sizes(), geometry, channels_last);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) result[2] = conv2d_bias_grad(dy);
    return result;
  }
};

// Bilinear in (dy, weight).
struct Conv2dInputGrad : Function<Conv2dInputGrad, &conv2d_input_grad> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& dy, const Tensor& weight, SymInts,
                   const Geometry& geometry, bool channels_last) {
    save_all(ctx, dy, weight, geometry, channels_last);
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gg = grads[0], &dy = saved[0], &weight = saved[1];
    const Geometry geometry(ctx->saved_data["geometry"]);
    if (ctx->needs_input_grad(0)) result[0] = conv2d(gg, weight, {}, geometry);
    if (ctx->needs_input_grad(1)) {
      result[1] =
          conv2d_weight_grad(dy, gg, weight.sym_sizes(), geometry, ctx->saved_data["channels_last"].toBool());
    }
    return result;
  }
};

// Bilinear in (dy, x).
struct Conv2dWeightGrad : Function<Conv2dWeightGrad, &conv2d_weight_grad> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& dy, const Tensor& x, SymInts,
                   const Geometry& geometry, bool channels_last) {
    save_all(ctx, dy, x, geometry, channels_last);
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gg = grads[0], &dy = saved[0], &x = saved[1];
    const Geometry geometry(ctx->saved_data["geometry"]);
    if (ctx->needs_input_grad(0)) result[0] = conv2d(x, gg, {}, geometry);
    if (ctx->needs_input_grad(1)) {
      result[1] =
          conv2d_input_grad(dy, gg, x.sym_sizes(), geometry, ctx->saved_data["channels_last"].toBool());
    }
    return result;
  }
};

struct Conv2dBiasGrad : Function<Conv2dBiasGrad, &conv2d_bias_grad> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& dy) {
    ctx->saved_data["shape"] = dy.sym_sizes();
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor()};
    return {grads[0].view({-1, 1, 1}).expand_symint(ctx->saved_data["shape"].toSymIntVector())};
  }
};

Tensor conv2d_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymInts stride,
                       SymInts padding, SymInts dilation, c10::SymInt groups) {
  return Conv2d::record("conv2d", x, weight, bias, geometry_of(stride, padding, dilation, groups));
}

Tensor conv2d_input_grad_autograd(const Tensor& dy, const Tensor& weight, SymInts input_size, SymInts stride,
                                  SymInts padding, SymInts dilation, c10::SymInt groups, bool channels_last) {
  return Conv2dInputGrad::record("conv2d_input_grad", dy, weight, input_size,
                                 geometry_of(stride, padding, dilation, groups), channels_last);
}

Tensor conv2d_weight_grad_autograd(const Tensor& dy, const Tensor& x, SymInts weight_size, SymInts stride,
                                   SymInts padding, SymInts dilation, c10::SymInt groups,
                                   bool channels_last) {
  return Conv2dWeightGrad::record("conv2d_weight_grad", dy, x, weight_size,
                                  geometry_of(stride, padding, dilation, groups), channels_last);
}

Tensor conv2d_bias_grad_autograd(const Tensor& dy) { return Conv2dBiasGrad::record("conv2d_bias_grad", dy); }

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
