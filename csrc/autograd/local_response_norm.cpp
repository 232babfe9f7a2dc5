#include "autograd/autocast.h"
#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

using Constants = std::tuple<int64_t, double, double, double>;  // size, α, β, k

struct LocalResponseNorm : Function<LocalResponseNorm, &local_response_norm> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& x, int64_t size, double alpha,
                   double beta, double k) {
    ctx->save_for_backward({x});
    ctx->saved_data["constants"] = Constants(size, alpha, beta, k);
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor()};
    const auto [size, alpha, beta, k] = ctx->saved_data["constants"].to<Constants>();
    return {local_response_norm_backward(grads[0], ctx->get_saved_variables()[0], size, alpha, beta, k)};
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
struct LocalResponseNormBackward : Function<LocalResponseNormBackward, &local_response_norm_backward> {
  static void save(AutogradContext* ctx, const Tensor&, const Tensor& dy, const Tensor& x, int64_t size,
                   double alpha, double beta, double k) {
    ctx->save_for_backward({dy, x});
    ctx->saved_data["constants"] = Constants(size, alpha, beta, k);
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(2);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gg = grads[0], &dy = saved[0], &x = saved[1];
    const auto [n, alpha, beta, k] = ctx->saved_data["constants"].to<Constants>();
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
  return LocalResponseNorm::record("local_response_norm", x, size, alpha, beta, k);
}

Tensor local_response_norm_backward_autograd(const Tensor& dy, const Tensor& x, int64_t size, double alpha,
                                             double beta, double k) {
  return LocalResponseNormBackward::record("local_response_norm_backward", dy, x, size, alpha, beta, k);
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
