#include "eager_vectors.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "eager.h"
#include "eager_read.h"

namespace cuda_cnn::eager {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether a loop may read tensors where they lie: those of a CPU, seen by no mode and no transform.
bool nobody_else_sees() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}
bool lies_plainly(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.is_contiguous() && !tensor.is_neg() &&
         !tensor._is_zerotensor() && !autograd::any_has_tangent(tensor) &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}
bool lies_plainly(const OptionalTensor& tensor) { return !tensor || lies_plainly(*tensor); }

// run(number): of the type that a vector has.
template <class Run>
void with_type_of(const Tensor& vector, const Run& run) {
  if (vector.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
}
template <class T>
const T* data_or_null(const OptionalTensor& vector) {
  return vector ? vector->const_data_ptr<T>() : nullptr;
}

void follow_plainly(const Tensor& running, const Tensor& value, double momentum, double factor) {
  with_type_of(running, [&](auto type) {
    with_type_of(value, [&](auto value_type) {
      using T = decltype(type);
      T* to = running.mutable_data_ptr<T>();
      const auto* from = value.const_data_ptr<decltype(value_type)>();
      for (int64_t c = 0; c < running.numel(); ++c) {
        const T kept = to[c] * static_cast<T>(1 - momentum);  // rounded, as by torch's operators
        to[c] = static_cast<T>(kept + from[c] * (momentum * factor));
      }
    });
  });
  torch::autograd::impl::bump_version(running);
}

// What a batch normalisation does to a channel, as scale and shift.
//   scale = weight * inverse, shift = bias - mean * scale, inverse = 1 / sqrt(var + eps)
//   with g = dscale - mean * dshift: dmean = -scale * dshift, dvar = -g * weight * inverse^3 / 2,
//   dweight = g * inverse, dbias = dshift
struct NormVectors : torch::autograd::Function<NormVectors> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mean, const Tensor& var,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    ctx->save_for_backward({mean, var, weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["has_bias"] = bias.has_value();
    const Tensor scale = at::empty_like(mean), shift = at::empty_like(mean);
    with_type_of(mean, [&](auto type) {
      using T = decltype(type);
      const T *m = mean.const_data_ptr<T>(), *v = var.const_data_ptr<T>();
      const T *w = data_or_null<T>(weight), *b = data_or_null<T>(bias);
      T *to_scale = scale.mutable_data_ptr<T>(), *to_shift = shift.mutable_data_ptr<T>();
      for (int64_t c = 0; c < mean.numel(); ++c) {
        const T s = (w ? w[c] : T(1)) / std::sqrt(v[c] + static_cast<T>(eps));
        to_scale[c] = s;
        to_shift[c] = (b ? b[c] : T(0)) - m[c] * s;
      }
    });
    return {scale, shift};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &mean = saved[0], &var = saved[1], &weight = saved[2];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    Tensor dmean, dvar, dweight, dbias;
    if (at::GradMode::is_enabled() || !nobody_else_sees() || !lies_plainly(grads[0]) ||
        !lies_plainly(grads[1])) {
      const Tensor inverse = (var + eps).rsqrt(), scale = weight.defined() ? weight * inverse : inverse;
      const Tensor g = grads[0] - mean * grads[1];
      dmean = -scale * grads[1];
      dvar = g * scale * inverse * inverse * -0.5;
      dweight = g * inverse;
      dbias = grads[1];
    } else {
      dmean = at::empty_like(mean), dvar = at::empty_like(mean), dweight = at::empty_like(mean);
      dbias = grads[1];
      with_type_of(mean, [&](auto type) {
        using T = decltype(type);
        const T *m = mean.const_data_ptr<T>(), *v = var.const_data_ptr<T>();
        const T* w = weight.defined() ? weight.const_data_ptr<T>() : nullptr;
        const T *dscale = grads[0].const_data_ptr<T>(), *dshift = grads[1].const_data_ptr<T>();
        T *to_mean = dmean.mutable_data_ptr<T>(), *to_var = dvar.mutable_data_ptr<T>(),
          *to_weight = dweight.mutable_data_ptr<T>();
        for (int64_t c = 0; c < mean.numel(); ++c) {
          const T inverse = 1 / std::sqrt(v[c] + static_cast<T>(eps)), s = (w ? w[c] : T(1)) * inverse;
          const T g = dscale[c] - m[c] * dshift[c];
          to_mean[c] = -s * dshift[c];
          to_var[c] = g * s * inverse * inverse * T(-0.5);
          to_weight[c] = g * inverse;
        }
      });
    }
    return {dmean, dvar, weight.defined() ? dweight : Tensor(), has_bias ? dbias : Tensor(), Tensor()};
  }
};

// vectors(mean, var, weight, bias, eps) -> (scale, shift): layers._vectors
PyObject* vectors(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor mean, var;
  OptionalTensor weight, bias;
  double eps = 0;
  if (!read_all(values, count, &mean, &var, &weight, &bias, &eps) || !nobody_else_sees()) return not_plain();
  const auto fits = [&](const OptionalTensor& vector) {
    return lies_plainly(vector) &&
           (!vector || (vector->scalar_type() == mean.scalar_type() && vector->sizes() == mean.sizes()));
  };
  if (!fits(mean) || !fits(var) || !fits(weight) || !fits(bias)) return not_plain();
  const variable_list found = NormVectors::apply(mean, var, weight, bias, eps);
  return pybind11::make_tuple(found[0], found[1]).release().ptr();
  END_HANDLE_TH_ERRORS
}

// follow(running_mean, running_var, batches, mean, var, momentum, unbiased) -> True: layers.follow
PyObject* follow_batch(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor running_mean, running_var, batches, mean, var;
  double momentum = 0, unbiased = 0;
  if (!read_all(values, count, &running_mean, &running_var, &batches, &mean, &var, &momentum, &unbiased)) {
    return not_plain();
  }
  const at::NoGradGuard no_grad;
  batches.add_(1);
  follow(running_mean, mean, momentum, 1);
  follow(running_var, var, momentum, unbiased);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace

void follow(const Tensor& running, const Tensor& value, double momentum, double factor) {
  if (nobody_else_sees() && lies_plainly(running) && lies_plainly(value) && !running.is_inference() &&
      running.sizes() == value.sizes()) {
    follow_plainly(running, value, momentum, factor);
  } else {
    running.mul_(1 - momentum).add_(value, momentum * factor);
  }
}

PyMethodDef* vector_methods() {
  static PyMethodDef methods[] = {
      CUDA_CNN_EAGER(follow_batch), CUDA_CNN_EAGER(vectors), {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace cuda_cnn::eager
