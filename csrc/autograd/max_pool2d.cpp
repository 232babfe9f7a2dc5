// The taps (which cell of a window was the largest) make pooling a linear map, its gradient the transpose,
// and the gradient's gradient the map again, called gather.
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

struct MaxPool2dBackward : Formula {
  static constexpr const char* kName = "MaxPool2dBackward";
  Window window;
  std::array<c10::SymInt, 2> plane;

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.grads[0], &taps = of.saved[0];
    return {dy.defined() ? max_pool2d_backward(dy, taps, plane, window) : Tensor()};
  }
};

struct MaxPool2dDoubleBackward : Formula {
  static constexpr const char* kName = "MaxPool2dDoubleBackward";
  Window window;

  variable_list operator()(const Derivative& of) const {
    const Tensor &gdx = of.grads[0], &taps = of.saved[0];
    return {gdx.defined() ? max_pool2d_gather(gdx, taps, window) : Tensor(), Tensor()};
  }
};

Window window_of(Ints kernel, Ints stride, Ints padding, Ints dilation) {
  return {pair("max_pool2d", "kernel_size", kernel), pair("max_pool2d", "stride", stride),
          pair("max_pool2d", "padding", padding), pair("max_pool2d", "dilation", dilation)};
}

std::array<c10::SymInt, 2> plane_of(const Tensor& x) { return {x.sym_size(-2), x.sym_size(-1)}; }

template <class Run>
auto recorded(const char* op, const Tensor& x, const Window& window, const Run& run) {
  return record<MaxPool2dBackward>(
      op, run,
      [&](auto& node, const auto& results) {
        node.save({std::get<1>(results)});
        node.formula.window = window;
        node.formula.plane = plane_of(x);
      },
      x);
}

std::tuple<Tensor, Tensor> max_pool2d_with_taps_autograd(const Tensor& x, Ints kernel, Ints stride,
                                                         Ints padding, Ints dilation, bool ceil_mode) {
  const Window window = window_of(kernel, stride, padding, dilation);
  return recorded("max_pool2d", x, window, [&] { return max_pool2d_with_taps(x, window, ceil_mode); });
}

std::tuple<Tensor, Tensor, Tensor> max_pool2d_with_indices_autograd(const Tensor& x, Ints kernel, Ints stride,
                                                                    Ints padding, Ints dilation,
                                                                    bool ceil_mode) {
  const Window window = window_of(kernel, stride, padding, dilation);
  return recorded("max_pool2d", x, window, [&] { return max_pool2d_with_indices(x, window, ceil_mode); });
}

// Where a gradient will be asked for, the form that leaves taps.
Tensor max_pool2d_autograd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                           bool ceil_mode) {
  const Window window = window_of(kernel, stride, padding, dilation);
  if (torch::autograd::compute_requires_grad(x) || has_tangent(x)) {
    return std::get<0>(max_pool2d_with_taps(x, window, ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return max_pool2d(x, window, ceil_mode);
}

Tensor max_pool2d_backward_autograd(const Tensor& dy, const Tensor& taps, SymInts input_size, Ints kernel,
                                    Ints stride, Ints padding, Ints dilation) {
  const Window window = window_of(kernel, stride, padding, dilation);
  return record<MaxPool2dDoubleBackward>(
      "max_pool2d_backward", [&] { return max_pool2d_backward(dy, taps, input_size, window); },
      [&](auto& node, const Tensor&) {
        node.save({taps});
        node.formula.window = window;
      },
      dy, taps);
}

Tensor max_pool2d_gather_autograd(const Tensor& x, const Tensor& taps, Ints kernel, Ints stride, Ints padding,
                                  Ints dilation) {
  const Window window = window_of(kernel, stride, padding, dilation);
  return record<MaxPool2dBackward>(
      "max_pool2d_gather", [&] { return max_pool2d_gather(x, taps, window); },
      [&](auto& node, const Tensor&) {
        node.save({taps});
        node.formula.window = window;
        node.formula.plane = plane_of(x);
      },
      x);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("max_pool2d", &max_pool2d_autograd);
  library.impl("max_pool2d_with_taps", &max_pool2d_with_taps_autograd);
  library.impl("max_pool2d_with_indices", &max_pool2d_with_indices_autograd);
  library.impl("max_pool2d_backward", &max_pool2d_backward_autograd);
  library.impl("max_pool2d_gather", &max_pool2d_gather_autograd);
}

}  // namespace cuda_cnn::autograd
