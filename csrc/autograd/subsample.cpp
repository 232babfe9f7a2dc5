#include "kernels/subsample.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

struct Subsample : Function<Subsample, &subsample> {
  static void save(AutogradContext* ctx, const Tensor& y, const Tensor& x, const Tensor& coefficient,
                   const Tensor&, const Kernel& kernel, c10::string_view squash) {
    ctx->save_for_backward({x, coefficient, y});
    ctx->saved_data["kernel"] = Ints(kernel);
    ctx->saved_data["squash"] = std::string(squash);
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(3);
    const variable_list saved = ctx->get_saved_variables();
    const auto [dx, dcoefficient, dbias] =
        subsample_backward(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["kernel"].toIntVector(),
                           ctx->saved_data["squash"].toStringRef());
    return {dx, dcoefficient, dbias};
  }
};

// The squashing function's slope where its value is y, and the derivative of that for y.
std::pair<Tensor, Tensor> slopes(const Tensor& y, const std::string& squash) {
  constexpr double kSteepness = kSquashSlope / kSquashAmplitude;
  if (squash == "tanh") {
    return {kSquashSlope * kSquashAmplitude - kSteepness * y * y, -2 * kSteepness * y};
  }
  if (squash == "sigmoid") return {y * (1 - y), 1 - 2 * y};
  return {at::ones_like(y), at::zeros_like(y)};
}

// Plain tensor arithmetic: autograd takes every further derivative by itself. With P the window sum, Pᵀ its
// transpose, g(y) the squashing function's slope: da = dy·g(y), dx = Pᵀ(coefficient·da), dcoefficient = Σ
// da·P(x), dbias = Σ da. So the gradients' product with what comes in is Σ da·q.
struct SubsampleBackward : Function<SubsampleBackward, &subsample_backward> {
  template <class Results>
  static void save(AutogradContext* ctx, const Results&, const Tensor& dy, const Tensor& x,
                   const Tensor& coefficient, const Tensor& y, const Kernel& kernel,
                   c10::string_view squash) {
    ctx->save_for_backward({dy, x, coefficient, y});
    ctx->saved_data["kernel"] = Ints(kernel);
    ctx->saved_data["squash"] = std::string(squash);
  }

  static Tensor window_sum(const Tensor& t, Ints kernel) {
    return at::avg_pool2d(t, kernel, {}, 0, /*ceil_mode=*/false, /*count_include_pad=*/true,
                          /*divisor_override=*/1);
  }

  static Tensor spread(const Tensor& t, const Tensor& like, Ints kernel) {
    const Tensor wide = t.repeat_interleave(kernel[0], -2).repeat_interleave(kernel[1], -1);
    return at::constant_pad_nd_symint(wide,
                                      std::vector<c10::SymInt>{0, like.sym_size(-1) - wide.sym_size(-1), 0,
                                                               like.sym_size(-2) - wide.sym_size(-2)});
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1], &coefficient = saved[2], &y = saved[3];
    const auto kernel = ctx->saved_data["kernel"].toIntVector();
    const auto given = [&](size_t i, const Tensor& like) {
      return grads[i].defined() ? grads[i] : at::zeros_like(like);
    };
    const auto per_channel = [](const Tensor& t) { return t.view({-1, 1, 1}); };
    const Tensor gdcoefficient = per_channel(given(1, coefficient)),
                 gdbias = per_channel(given(2, coefficient));
    const auto [slope, curvature] = slopes(y, ctx->saved_data["squash"].toStringRef());
    const Tensor gathered = window_sum(given(0, x), kernel);
    const Tensor q = per_channel(coefficient) * gathered + gdcoefficient * window_sum(x, kernel) + gdbias;
    const Tensor da = dy * slope;
    std::vector<int64_t> every_but_channels = {-2, -1};
    if (x.dim() == 4) every_but_channels.push_back(0);
    return {slope * q, spread(da * gdcoefficient, x, kernel), (da * gathered).sum(every_but_channels),
            dy * curvature * q};
  }
};

Tensor subsample_autograd(const Tensor& x, const Tensor& coefficient, const Tensor& bias, Ints kernel,
                          c10::string_view squash) {
  return Subsample::record("subsample", x, coefficient, bias, pair("subsample", "kernel_size", kernel),
                           squash);
}

std::tuple<Tensor, Tensor, Tensor> subsample_backward_autograd(const Tensor& dy, const Tensor& x,
                                                               const Tensor& coefficient, const Tensor& y,
                                                               Ints kernel, c10::string_view squash) {
  return SubsampleBackward::record("subsample_backward", dy, x, coefficient, y,
                                   pair("subsample", "kernel_size", kernel), squash);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("subsample", &subsample_autograd);
  library.impl("subsample_backward", &subsample_backward_autograd);
}

}  // namespace cuda_cnn::autograd
