// The taps (which cell of a window was the largest) make pooling a linear map, its gradient the transpose,
// and the gradient's gradient the map again, called gather.
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

Window window_of(Ints kernel, Ints stride, Ints padding, Ints dilation) {
  return {pair("max_pool2d", "kernel_size", kernel), pair("max_pool2d", "stride", stride),
          pair("max_pool2d", "padding", padding), pair("max_pool2d", "dilation", dilation)};
}

// Pooling leaves the taps, gather is given them; both pick by them.
template <class F, auto kOperator>
struct Picking : Function<F, kOperator> {
  template <class Results>
  static void save(AutogradContext* ctx, const Results& results, const Tensor& x, const Window& window,
                   bool) {
    save(ctx, Tensor(), x, std::get<1>(results), window);
  }
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& x, const Tensor& taps,
                   const Window& window) {
    ctx->save_for_backward({taps});
    ctx->saved_data["window"] = window.values();
    ctx->saved_data["plane"] = std::vector<c10::SymInt>{x.sym_size(-2), x.sym_size(-1)};
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor()};
    return {max_pool2d_backward(grads[0], ctx->get_saved_variables()[0],
                                ctx->saved_data["plane"].toSymIntVector(),
                                Window(ctx->saved_data["window"]))};
  }
};
struct MaxPool2dWithTaps : Picking<MaxPool2dWithTaps, &max_pool2d_with_taps> {};
struct MaxPool2dWithIndices : Picking<MaxPool2dWithIndices, &max_pool2d_with_indices> {};
struct MaxPool2dGather : Picking<MaxPool2dGather, &max_pool2d_gather> {};

struct MaxPool2dBackward : Function<MaxPool2dBackward, &max_pool2d_backward> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor&, const Tensor& taps, SymInts,
                   const Window& window) {
    ctx->save_for_backward({taps});
    ctx->saved_data["window"] = window.values();
  }
  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(2);
    const Window window(ctx->saved_data["window"]);
    return {max_pool2d_gather(grads[0], ctx->get_saved_variables()[0], window), Tensor()};
  }
};

std::tuple<Tensor, Tensor> max_pool2d_with_taps_autograd(const Tensor& x, Ints kernel, Ints stride,
                                                         Ints padding, Ints dilation, bool ceil_mode) {
  return MaxPool2dWithTaps::record("max_pool2d", x, window_of(kernel, stride, padding, dilation), ceil_mode);
}

std::tuple<Tensor, Tensor, Tensor> max_pool2d_with_indices_autograd(const Tensor& x, Ints kernel, Ints stride,
                                                                    Ints padding, Ints dilation,
                                                                    bool ceil_mode) {
  return MaxPool2dWithIndices::record("max_pool2d", x, window_of(kernel, stride, padding, dilation),
                                      ceil_mode);
}

// Where a gradient will be asked for, the form that leaves taps.
Tensor max_pool2d_autograd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                           bool ceil_mode) {
  const Window window = window_of(kernel, stride, padding, dilation);
  if (any_requires_grad(x) || any_has_tangent(x))
    return std::get<0>(max_pool2d_with_taps(x, window, ceil_mode));
  const at::AutoDispatchBelowADInplaceOrView below;
  return max_pool2d(x, window, ceil_mode);
}

Tensor max_pool2d_backward_autograd(const Tensor& dy, const Tensor& taps, SymInts input_size, Ints kernel,
                                    Ints stride, Ints padding, Ints dilation) {
  return MaxPool2dBackward::record("max_pool2d_backward", dy, taps, input_size,
                                   window_of(kernel, stride, padding, dilation));
}

Tensor max_pool2d_gather_autograd(const Tensor& x, const Tensor& taps, Ints kernel, Ints stride, Ints padding,
                                  Ints dilation) {
  return MaxPool2dGather::record("max_pool2d_gather", x, taps, window_of(kernel, stride, padding, dilation));
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
