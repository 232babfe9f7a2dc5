// The operators as functions of C++, through the dispatcher: for formulas and for the calls from Python.
#pragma once

#include "autograd/function.h"

namespace cuda_cnn::autograd {

struct Geometry {
  std::array<c10::SymInt, 2> stride, padding, dilation;
  c10::SymInt groups;

  Geometry() = default;
  Geometry(std::array<c10::SymInt, 2> stride, std::array<c10::SymInt, 2> padding,
           std::array<c10::SymInt, 2> dilation, c10::SymInt groups)
      : stride(stride), padding(padding), dilation(dilation), groups(std::move(groups)) {}
  explicit Geometry(const c10::IValue& saved) {
    const auto v = saved.toSymIntVector();
    stride = {v[0], v[1]}, padding = {v[2], v[3]}, dilation = {v[4], v[5]}, groups = v[6];
  }
  c10::IValue values() const {
    return std::vector<c10::SymInt>{stride[0],   stride[1],   padding[0], padding[1],
                                    dilation[0], dilation[1], groups};
  }
};

inline Tensor conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Geometry& g) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymInts, SymInts,
                                     SymInts, c10::SymInt)>("conv2d");
  return op.call(x, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

inline Tensor conv2d_input_grad(const Tensor& dy, const Tensor& weight, SymInts input_size, const Geometry& g,
                                bool channels_last) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, SymInts, SymInts, SymInts, SymInts, c10::SymInt, bool)>(
          "conv2d_input_grad");
  return op.call(dy, weight, input_size, g.stride, g.padding, g.dilation, g.groups, channels_last);
}

inline Tensor conv2d_weight_grad(const Tensor& dy, const Tensor& x, SymInts weight_size, const Geometry& g,
                                 bool channels_last) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, SymInts, SymInts, SymInts, SymInts, c10::SymInt, bool)>(
          "conv2d_weight_grad");
  return op.call(dy, x, weight_size, g.stride, g.padding, g.dilation, g.groups, channels_last);
}

inline Tensor conv2d_bias_grad(const Tensor& dy) {
  static const auto op = find<Tensor(const Tensor&)>("conv2d_bias_grad");
  return op.call(dy);
}

// What conv2d_packed and conv2d_packed_ do beside the convolution.
struct Fusion {
  OptionalTensor bias, in_scale, in_shift;
  bool in_relu = false;
  OptionalTensor residual;
  bool out_relu = false;
};

inline Tensor conv2d_packed(const Tensor& x, const Tensor& weight, const Tensor& packed, const Fusion& f,
                            const Geometry& g) {
  using Optional = const OptionalTensor&;
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional, bool, Optional,
                  bool, SymInts, SymInts, SymInts, c10::SymInt)>("conv2d_packed");
  return op.call(x, weight, packed, f.bias, f.in_scale, f.in_shift, f.in_relu, f.residual, f.out_relu,
                 g.stride, g.padding, g.dilation, g.groups);
}

inline void conv2d_packed_(Tensor out, const Tensor& x, const Tensor& weight, const Tensor& packed,
                           const Fusion& f, const Geometry& g) {
  using Optional = const OptionalTensor&;
  static const auto op =
      find<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional, bool,
                Optional, bool, SymInts, SymInts, SymInts, c10::SymInt)>("conv2d_packed_");
  op.call(out, x, weight, packed, f.bias, f.in_scale, f.in_shift, f.in_relu, f.residual, f.out_relu, g.stride,
          g.padding, g.dilation, g.groups);
}

inline Tensor local_response_norm(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  static const auto op = find<Tensor(const Tensor&, int64_t, double, double, double)>("local_response_norm");
  return op.call(x, size, alpha, beta, k);
}

inline Tensor local_response_norm_backward(const Tensor& dy, const Tensor& x, int64_t size, double alpha,
                                           double beta, double k) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, double, double, double)>(
      "local_response_norm_backward");
  return op.call(dy, x, size, alpha, beta, k);
}

inline Tensor concat(at::TensorList tensors, int64_t dim) {
  static const auto op = find<Tensor(at::TensorList, int64_t)>("concat");
  return op.call(tensors, dim);
}

struct Window {
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  Window() = default;
  Window(std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
         std::array<int64_t, 2> dilation)
      : kernel(kernel), stride(stride), padding(padding), dilation(dilation) {}
  explicit Window(const c10::IValue& saved) {
    const auto v = saved.toIntVector();
    kernel = {v[0], v[1]}, stride = {v[2], v[3]}, padding = {v[4], v[5]}, dilation = {v[6], v[7]};
  }
  c10::IValue values() const {
    return std::vector<int64_t>{kernel[0],  kernel[1],  stride[0],   stride[1],
                                padding[0], padding[1], dilation[0], dilation[1]};
  }
};

inline Tensor max_pool2d(const Tensor& x, const Window& w, bool ceil_mode) {
  static const auto op = find<Tensor(const Tensor&, Ints, Ints, Ints, Ints, bool)>("max_pool2d");
  return op.call(x, w.kernel, w.stride, w.padding, w.dilation, ceil_mode);
}

inline std::tuple<Tensor, Tensor> max_pool2d_with_taps(const Tensor& x, const Window& w, bool ceil_mode) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, Ints, Ints, Ints, Ints, bool)>("max_pool2d_with_taps");
  return op.call(x, w.kernel, w.stride, w.padding, w.dilation, ceil_mode);
}

inline std::tuple<Tensor, Tensor, Tensor> max_pool2d_with_indices(const Tensor& x, const Window& w,
                                                                  bool ceil_mode) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, Ints, Ints, Ints, Ints, bool)>(
          "max_pool2d_with_indices");
  return op.call(x, w.kernel, w.stride, w.padding, w.dilation, ceil_mode);
}

inline Tensor max_pool2d_backward(const Tensor& dy, const Tensor& taps, SymInts input_size, const Window& w) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, SymInts, Ints, Ints, Ints, Ints)>("max_pool2d_backward");
  return op.call(dy, taps, input_size, w.kernel, w.stride, w.padding, w.dilation);
}

inline Tensor max_pool2d_gather(const Tensor& x, const Tensor& taps, const Window& w) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, Ints, Ints, Ints, Ints)>("max_pool2d_gather");
  return op.call(x, taps, w.kernel, w.stride, w.padding, w.dilation);
}

using Kernel = std::array<int64_t, 2>;

inline Tensor subsample(const Tensor& x, const Tensor& coefficient, const Tensor& bias, Ints kernel,
                        c10::string_view squash) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, Ints, c10::string_view)>("subsample");
  return op.call(x, coefficient, bias, kernel, squash);
}

inline std::tuple<Tensor, Tensor, Tensor> subsample_backward(const Tensor& dy, const Tensor& x,
                                                             const Tensor& coefficient, const Tensor& y,
                                                             Ints kernel, c10::string_view squash) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              Ints, c10::string_view)>("subsample_backward");
  return op.call(dy, x, coefficient, y, kernel, squash);
}

struct BatchNormMode {
  bool training;
  double eps;
  bool relu;

  BatchNormMode() = default;
  BatchNormMode(bool training, double eps, bool relu) : training(training), eps(eps), relu(relu) {}
  explicit BatchNormMode(const c10::IValue& saved) {
    std::tie(training, eps, relu) = saved.to<std::tuple<bool, double, bool>>();
  }
  c10::IValue values() const { return std::make_tuple(training, eps, relu); }
};

inline std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& residual,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& running_mean,
                                                     const OptionalTensor& running_var,
                                                     const BatchNormMode& mode) {
  using Optional = const OptionalTensor&;
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, Optional, Optional, Optional, Optional, Optional, bool, double, bool)>("batch_norm");
  return op.call(x, residual, weight, bias, running_mean, running_var, mode.training, mode.eps, mode.relu);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const BatchNormMode& mode,
    std::array<bool, 3> wants) {
  using Optional = const OptionalTensor&;
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, Optional, Optional, Optional, const Tensor&, const Tensor&, bool, double,
      bool, std::array<bool, 3>)>("batch_norm_backward");
  return op.call(dy, x, y, weight, bias, mean, var, mode.training, mode.eps, mode.relu, wants);
}

}  // namespace cuda_cnn::autograd
