#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

struct BatchNormBackward : Formula {
  static constexpr const char* kName = "BatchNormBackward";
  BatchNormMode mode;
  bool has_residual;

  variable_list operator()(const Derivative& of) const {
    const Tensor& dy = of.grads[0];
    variable_list result(6);
    if (!dy.defined()) return result;
    const variable_list& s = of.saved;  // x, y, weight, bias, mean, var
    const bool wants_parameters = of.wanted(2) || of.wanted(3), masks = mode.relu && has_residual;
    const auto [dx, dweight, dbias, dresidual] =
        batch_norm_backward(dy, s[0], optional(s[1]), optional(s[2]), optional(s[3]), s[4], s[5], mode,
                            {of.wanted(0), wants_parameters, of.wanted(1) && masks});
    if (of.wanted(0)) result[0] = dx;
    if (of.wanted(1)) result[1] = masks ? dresidual : dy;
    if (of.wanted(2)) result[2] = dweight;
    if (of.wanted(3)) result[3] = dbias;
    return result;
  }
};

// Gradients for (dy, x, y, weight) of ⟨gdx, dx⟩ + ⟨gdweight, dweight⟩ + ⟨gdbias, dbias⟩ + ⟨gdresidual,
// dresidual⟩.
//
// With g = dy under the mask, s = 1/√(var + ε), x̂ = (x − mean)·s and the self-adjoint map
// P(v) = v − ⟨v⟩ − x̂·⟨v·x̂⟩ (P(v) = v outside training), where ⟨·⟩ is a channel's mean:
//     dx = weight·s·P(g)      dweight = Σ g·x̂      dbias = Σ g      dresidual = g
// mean and var count as functions of x in training, and as constants otherwise. Plain tensor arithmetic, so
// that autograd takes every further derivative by itself.
struct BatchNormDoubleBackward : Formula {
  static constexpr const char* kName = "BatchNormDoubleBackward";
  static constexpr size_t kOutputs = 4;
  BatchNormMode mode;

  variable_list operator()(const Derivative& of) const {
    const Tensor &dy = of.saved[0], &x = of.saved[1], &y = of.saved[2], &weight = of.saved[3],
                 &bias = of.saved[4];
    const auto compute = at::promote_types(x.scalar_type(), at::kFloat);
    std::vector<int64_t> dims, column(x.dim() - 1, 1);
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (d != 1) dims.push_back(d);
    }
    column[0] = -1;
    const auto per_channel = [&](const Tensor& t) { return t.to(compute).view(column); };
    const auto mean_of = [&](const Tensor& t) { return t.mean(dims, /*keepdim=*/true); };
    const auto given = [&](size_t i, bool channel) {
      const bool some = of.grads[i].defined() && of.grads[i].sym_numel() != 0;
      return !some ? Tensor() : channel ? per_channel(of.grads[i]) : of.grads[i].to(compute);
    };
    const Tensor gdx = given(0, false), gdweight = given(1, true), gdbias = given(2, true),
                 gdresidual = given(3, false);

    Tensor g = dy.to(compute), mean, var;
    const Tensor values = x.to(compute);
    if (mode.training) {
      std::tie(var, mean) = at::var_mean(values, dims, /*correction=*/0, /*keepdim=*/true);
    } else {
      mean = per_channel(of.saved[5]), var = per_channel(of.saved[6]);
    }
    const Tensor scale = (var + mode.eps).rsqrt(), normalised = (values - mean) * scale;
    const Tensor gamma = weight.defined() ? per_channel(weight) : at::ones_like(scale);
    Tensor mask;
    if (mode.relu) {
      const Tensor linear = y.defined()      ? y
                            : bias.defined() ? normalised * gamma + per_channel(bias)
                                             : normalised * gamma;
      mask = (linear > 0).to(compute);
      g = g * mask;
    }
    const auto project = [&](const Tensor& t) {
      return mode.training ? t - mean_of(t) - normalised * mean_of(t * normalised) : t;
    };

    Tensor grad_g = at::zeros_like(g), grad_x = at::zeros_like(g), grad_normalised = at::zeros_like(g),
           grad_weight;
    if (gdx.defined()) {
      grad_g = grad_g + gamma * scale * project(gdx);
      const Tensor products = gdx * project(g);
      if (weight.defined()) {
        grad_weight =
            (scale * products.sum(dims, true)).reshape_symint(weight.sym_sizes()).to(weight.scalar_type());
      }
      if (mode.training) {
        const Tensor through_mean = gdx * mean_of(g * normalised) + g * mean_of(gdx * normalised);
        grad_normalised = grad_normalised - gamma * scale * through_mean;
        grad_x = grad_x - gamma * scale * scale * normalised * mean_of(products);
      }
    }
    if (gdweight.defined()) {
      grad_g = grad_g + gdweight * normalised;
      grad_normalised = grad_normalised + gdweight * g;
    }
    if (gdbias.defined()) grad_g = grad_g + gdbias;
    if (gdresidual.defined()) grad_g = grad_g + gdresidual;
    grad_x = grad_x + scale * project(grad_normalised);
    if (mode.relu) grad_g = grad_g * mask;
    return {grad_g.to(dy.scalar_type()), grad_x.to(x.scalar_type()), {}, grad_weight, {}, {}, {}};
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_autograd(const Tensor& x, const OptionalTensor& residual,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var, bool training,
                                                       double eps, bool relu) {
  const BatchNormMode mode{training, eps, relu};
  return record<BatchNormBackward>(
      "batch_norm", [&] { return batch_norm(x, residual, weight, bias, running_mean, running_var, mode); },
      [&](auto& node, const auto& results) {
        const auto& [y, mean, var] = results;
        node.save({x});
        // The ReLU's mask is recomputed from x, bit for bit, unless a residual went into it.
        if (relu && residual) {
          node.save_output(y);
        } else {
          node.save({std::nullopt});
        }
        node.save({weight, bias, training ? mean : running_mean, training ? var : running_var});
        node.formula.mode = mode;
        node.formula.has_residual = residual.has_value();
      },
      x, residual, weight, bias, running_mean, running_var);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_autograd(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, bool training, double eps, bool relu,
    std::array<bool, 3> wants) {
  const BatchNormMode mode{training, eps, relu};
  return record<BatchNormDoubleBackward>(
      "batch_norm_backward",
      [&] { return batch_norm_backward(dy, x, y, weight, bias, mean, var, mode, wants); },
      [&](auto& node, const auto&) {
        node.save({dy, x, y, weight, bias, mean, var});
        node.formula.mode = mode;
      },
      dy, x, y, weight, bias, mean, var);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("batch_norm", &batch_norm_autograd);
  library.impl("batch_norm_backward", &batch_norm_backward_autograd);
}

}  // namespace cuda_cnn::autograd
