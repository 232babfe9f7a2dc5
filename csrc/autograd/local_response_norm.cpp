#include "autograd/autocast.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

struct Constants {
  int64_t size;
  double alpha, beta, k;
};

struct LocalResponseNormBackward : Formula {
  static constexpr const char* kName = "LocalResponseNormBackward";
  Constants constants;

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.grads[0], &x = of.saved[0];
    const auto& [size, alpha, beta, k] = constants;
    return {dy.defined() ? local_response_norm_backward(dy, x, size, alpha, beta, k) : Tensor()};
  }
};

// Sum of t over channels c−⌊n/2⌋ … c+⌊(n−1)/2⌋ (transposed: the mirrored window).
Tensor window_sum(const Tensor& t, int64_t size, bool transposed = false) {
  int64_t above = size / 2, below = (size - 1) / 2;
  if (transposed) std::swap(above, below);
  std::vector<c10::SymInt> padding(2 * (t.dim() - 2), 0);
  padding.insert(padding.end(), {above, below});
  const Tensor padded = at::constant_pad_nd_symint(t, padding);
  Tensor sum = padded.narrow_symint(1, 0, t.sym_size(1));
  for (int64_t j = 1; j < size; ++j) sum = sum + padded.narrow_symint(1, j, t.sym_size(1));
  return sum;
}

// Plain tensor arithmetic, so that autograd takes every further derivative by itself. With W the window sum,
// Wᵀ its transpose, a = α/n, s = k + a·W(x²):  dx = s^−β·dy − 2aβ·x·Wᵀ(s^(−β−1)·x·dy).
struct LocalResponseNormDoubleBackward : Formula {
  static constexpr const char* kName = "LocalResponseNormDoubleBackward";
  Constants constants;

  variable_list operator()(const Derivative& of) const {
    const Tensor &gg = of.grads[0], &dy = of.saved[0], &x = of.saved[1];
    if (!gg.defined()) return variable_list(2);
    const auto& [n, alpha, beta, k] = constants;
    const double a = alpha / static_cast<double>(n);
    const Tensor s = k + a * window_sum(x * x, n);
    const Tensor p = s.pow(-beta), q = s.pow(-beta - 1), r = s.pow(-beta - 2);
    const Tensor u = window_sum(gg * x, n);
    const Tensor grad_dy = p * gg - 2 * a * beta * q * x * u;
    const Tensor grad_x =
        -2 * a * beta *
            (x * window_sum(q * gg * dy, n, true) + q * dy * u + gg * window_sum(q * x * dy, n, true)) +
        4 * a * a * beta * (beta + 1) * x * window_sum(r * x * dy * u, n, true);
    return {grad_dy.to(dy.scalar_type()), grad_x.to(x.scalar_type())};
  }
};

Tensor local_response_norm_autograd(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  return record<LocalResponseNormBackward>(
      "local_response_norm", [&] { return local_response_norm(x, size, alpha, beta, k); },
      [&](auto& node, const Tensor&) {
        node.save({x});
        node.formula.constants = {size, alpha, beta, k};
      },
      x);
}

Tensor local_response_norm_backward_autograd(const Tensor& dy, const Tensor& x, int64_t size, double alpha,
                                             double beta, double k) {
  return record<LocalResponseNormDoubleBackward>(
      "local_response_norm_backward",
      [&] { return local_response_norm_backward(dy, x, size, alpha, beta, k); },
      [&](auto& node, const Tensor&) {
        node.save({dy, x});
        node.formula.constants = {size, alpha, beta, k};
      },
      dy, x);
}

// As torch's: squares and their sums want float32.
template <c10::DeviceType kDevice>
Tensor local_response_norm_autocast(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  const Autocast<kDevice> cast(at::kFloat);
  return local_response_norm(cast(x), size, alpha, beta, k);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("local_response_norm", &local_response_norm_autograd);
  library.impl("local_response_norm_backward", &local_response_norm_backward_autograd);
}
TORCH_LIBRARY_IMPL(cuda_cnn, AutocastCPU, library) {
  library.impl("local_response_norm", &local_response_norm_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(cuda_cnn, AutocastCUDA, library) {
  library.impl("local_response_norm", &local_response_norm_autocast<at::kCUDA>);
}

}  // namespace cuda_cnn::autograd
