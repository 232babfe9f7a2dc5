#include "kernels/subsample.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

struct SubsampleBackward : Formula {
  static constexpr const char* kName = "SubsampleBackward";
  Kernel kernel;
  std::string squash;

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.grads[0], &x = of.saved[0], &coefficient = of.saved[1], &y = of.saved[2];
    if (!dy.defined()) return variable_list(3);
    const auto [dx, dcoefficient, dbias] = subsample_backward(dy, x, coefficient, y, kernel, squash);
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
struct SubsampleDoubleBackward : Formula {
  static constexpr const char* kName = "SubsampleDoubleBackward";
  static constexpr size_t kOutputs = 3;
  Kernel kernel;
  std::string squash;

  Tensor window_sum(const Tensor& t) const {
    return at::avg_pool2d(t, kernel, {}, 0, /*ceil_mode=*/false, /*count_include_pad=*/true,
                          /*divisor_override=*/1);
  }

  Tensor spread(const Tensor& t, const Tensor& like) const {
    const Tensor wide = t.repeat_interleave(kernel[0], -2).repeat_interleave(kernel[1], -1);
    return at::constant_pad_nd_symint(wide,
                                      std::vector<c10::SymInt>{0, like.sym_size(-1) - wide.sym_size(-1), 0,
                                                               like.sym_size(-2) - wide.sym_size(-2)});
  }

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.saved[0], &x = of.saved[1], &coefficient = of.saved[2], &y = of.saved[3];
    const auto given = [&](size_t i, const Tensor& like) {
      return of.grads[i].defined() ? of.grads[i] : at::zeros_like(like);
    };
    const auto per_channel = [](const Tensor& t) { return t.view({-1, 1, 1}); };
    const Tensor gdcoefficient = per_channel(given(1, coefficient)),
                 gdbias = per_channel(given(2, coefficient));
    const auto [slope, curvature] = slopes(y, squash);
    const Tensor gathered = window_sum(given(0, x));
    const Tensor q = per_channel(coefficient) * gathered + gdcoefficient * window_sum(x) + gdbias;
    const Tensor da = dy * slope;
    std::vector<int64_t> every_but_channels = {-2, -1};
    if (x.dim() == 4) every_but_channels.push_back(0);
    return {slope * q, spread(da * gdcoefficient, x), (da * gathered).sum(every_but_channels),
            dy * curvature * q};
  }
};

Tensor subsample_autograd(const Tensor& x, const Tensor& coefficient, const Tensor& bias, Ints kernel,
                          c10::string_view squash) {
  return record<SubsampleBackward>(
      "subsample", [&] { return subsample(x, coefficient, bias, kernel, squash); },
      [&](auto& node, const Tensor& y) {
        node.save({x, coefficient});
        node.save_output(y);
        node.formula.kernel = pair("subsample", "kernel_size", kernel);
        node.formula.squash = squash;
      },
      x, coefficient, bias);
}

std::tuple<Tensor, Tensor, Tensor> subsample_backward_autograd(const Tensor& dy, const Tensor& x,
                                                               const Tensor& coefficient, const Tensor& y,
                                                               Ints kernel, c10::string_view squash) {
  return record<SubsampleDoubleBackward>(
      "subsample_backward", [&] { return subsample_backward(dy, x, coefficient, y, kernel, squash); },
      [&](auto& node, const auto&) {
        node.save({dy, x, coefficient, y});
        node.formula.kernel = pair("subsample", "kernel_size", kernel);
        node.formula.squash = squash;
      },
      dy, x, coefficient, y);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("subsample", &subsample_autograd);
  library.impl("subsample_backward", &subsample_backward_autograd);
}

}  // namespace cuda_cnn::autograd
