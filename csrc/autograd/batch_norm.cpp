#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

// Of mean and var, where somebody uses them beside y: (dmean + 2·dvar·(x − mean)) / M, with M a channel's
// elements.
Tensor through_statistics(const Tensor& x, const Tensor& mean, const Tensor& dmean, const Tensor& dvar) {
  if (x.sym_numel() == 0) return at::zeros_like(x);
  std::vector<int64_t> column(x.dim() - 1, 1);
  column[0] = -1;
  const c10::SymInt count = x.sym_numel() / x.sym_size(1);
  Tensor dx = at::zeros_like(x, mean.scalar_type());
  if (dmean.defined()) dx = dx + dmean.view(column) / count;
  if (dvar.defined()) dx = dx + (x - mean.view(column)) * (dvar.view(column) * 2 / count);
  return dx.to(x.scalar_type());
}

struct BatchNorm : Function<BatchNorm, &batch_norm> {
  template <class Results>
  static void save(AutogradContext* ctx, const Results& results, const Tensor& x,
                   const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const BatchNormMode& mode) {
    const auto& [y, mean, var] = results;
    // The ReLU's mask is recomputed from x, bit for bit, unless a residual went into it.
    const Tensor masking = mode.relu && residual ? y : Tensor();
    ctx->save_for_backward({x, masking, weight.value_or(Tensor()), bias.value_or(Tensor()),
                            mode.training ? mean : *running_mean, mode.training ? var : *running_var});
    ctx->saved_data["mode"] = std::make_tuple(mode.training, mode.eps, mode.relu, residual.has_value());
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();  // x, y, weight, bias, mean, var
    const auto [training, eps, relu, has_residual] =
        ctx->saved_data["mode"].to<std::tuple<bool, double, bool, bool>>();
    const BatchNormMode mode(training, eps, relu);
    size_t edges = 0;  // what was not given has none
    const auto wanted = [&](bool given) { return given && ctx->needs_input_grad(edges++); };
    const bool wants_x = wanted(true), wants_residual = wanted(has_residual),
               wants_weight = wanted(s[2].defined()), wants_bias = wanted(s[3].defined());
    variable_list result(6);
    const NoGraph no_graph(grads[0]);
    if (const Tensor& dy = grads[0]; dy.defined()) {
      const bool masks = mode.relu && has_residual;
      const auto [dx, dweight, dbias, dresidual] =
          batch_norm_backward(dy, s[0], optional(s[1]), optional(s[2]), optional(s[3]), s[4], s[5], mode,
                              {wants_x, wants_weight || wants_bias, wants_residual && masks});
      if (wants_x) result[0] = dx;
      if (wants_residual) result[1] = masks ? dresidual : dy;
      if (wants_weight) result[2] = dweight;
      if (wants_bias) result[3] = dbias;
    }
    if (wants_x && mode.training && (grads[1].defined() || grads[2].defined())) {
      const Tensor dx = through_statistics(s[0], s[4], grads[1], grads[2]);
      result[0] = result[0].defined() ? result[0] + dx : dx;
    }
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
struct BatchNormBackward : Function<BatchNormBackward, &batch_norm_backward> {
  template <class Results>
  static void save(AutogradContext* ctx, const Results&, const Tensor& dy, const Tensor& x,
                   const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
                   const Tensor& mean, const Tensor& var, const BatchNormMode& mode,
                   const std::array<bool, 3>&) {
    ctx->save_for_backward(
        {dy, x, y.value_or(Tensor()), weight.value_or(Tensor()), bias.value_or(Tensor()), mean, var});
    ctx->saved_data["mode"] = mode.values();
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1], &y = saved[2], &weight = saved[3], &bias = saved[4];
    const BatchNormMode mode(ctx->saved_data["mode"]);
    const auto wide = at::promote_types(x.scalar_type(), at::kFloat);
    std::vector<int64_t> dims, column(x.dim() - 1, 1);
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (d != 1) dims.push_back(d);
    }
    column[0] = -1;
    const auto per_channel = [&](const Tensor& t) { return t.to(wide).view(column); };
    const auto mean_of = [&](const Tensor& t) { return t.mean(dims, /*keepdim=*/true); };
    const auto given = [&](size_t i, bool channel) {
      const bool some = grads[i].defined() && grads[i].sym_numel() != 0;
      return !some ? Tensor() : channel ? per_channel(grads[i]) : grads[i].to(wide);
    };
    const Tensor gdx = given(0, false), gdweight = given(1, true), gdbias = given(2, true),
                 gdresidual = given(3, false);

    Tensor g = dy.to(wide), mean, var;
    const Tensor values = x.to(wide);
    if (mode.training) {
      std::tie(var, mean) = at::var_mean(values, dims, /*correction=*/0, /*keepdim=*/true);
    } else {
      mean = per_channel(saved[5]), var = per_channel(saved[6]);
    }
    const Tensor scale = (var + mode.eps).rsqrt(), normalised = (values - mean) * scale;
    const Tensor gamma = weight.defined() ? per_channel(weight) : at::ones_like(scale);
    Tensor mask;
    if (mode.relu) {
      const Tensor linear = y.defined()      ? y
                            : bias.defined() ? normalised * gamma + per_channel(bias)
                                             : normalised * gamma;
      mask = (linear > 0).to(wide);
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
  return BatchNorm::record("batch_norm", x, residual, weight, bias, running_mean, running_var,
                           BatchNormMode(training, eps, relu));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_autograd(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, bool training, double eps, bool relu,
    std::array<bool, 3> wants) {
  return BatchNormBackward::record("batch_norm_backward", dy, x, y, weight, bias, mean, var,
                                   BatchNormMode(training, eps, relu), wants);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) {
  library.impl("batch_norm", &batch_norm_autograd);
  library.impl("batch_norm_backward", &batch_norm_backward_autograd);
}

}  // namespace cuda_cnn::autograd
