// The short way from Python to the operators. Plain tensors and plain numbers go to the dispatcher as they
// are, without the boxing of torch.ops, which takes longer than a small kernel. To anything else (a subclass,
// a mode, a traced or symbolic value, a string, a mistake) the answer is NotImplemented: the caller in
// cuda_cnn/ops then does it at length.
#include "eager.h"

#include "eager_read.h"
#include "eager_vectors.h"

namespace cuda_cnn::eager {
namespace {

using autograd::Geometry;
using autograd::Window;

PyObject* conv2d(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x, weight;
  OptionalTensor bias;
  Geometry g;
  if (!read_all(values, count, &x, &weight, &bias, &g.stride, &g.padding, &g.dilation, &g.groups) ||
      x.dim() != 4) {
    return not_plain();
  }
  return answer([&] { return autograd::conv2d(x, weight, bias, g); });
  END_HANDLE_TH_ERRORS
}

PyObject* max_pool2d(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  Window w;
  bool ceil_mode = false;
  if (!read_all(values, count, &x, &w.kernel, &w.stride, &w.padding, &w.dilation, &ceil_mode))
    return not_plain();
  return answer([&] { return autograd::max_pool2d(x, w, ceil_mode); });
  END_HANDLE_TH_ERRORS
}

PyObject* local_response_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  int64_t size = 0;
  double alpha = 0, beta = 0, k = 0;
  if (!read_all(values, count, &x, &size, &alpha, &beta, &k)) return not_plain();
  return answer([&] { return autograd::local_response_norm(x, size, alpha, beta, k); });
  END_HANDLE_TH_ERRORS
}

bool of_one_dtype(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const Tensor& t) { return t.scalar_type() == tensors[0].scalar_type(); });
}

PyObject* concat(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::vector<Tensor> tensors;
  int64_t dim = 0;
  if (!read_all(values, count, &tensors, &dim) || tensors.empty() || !of_one_dtype(tensors)) {
    return not_plain();
  }
  return answer([&] { return autograd::concat(tensors, dim); });
  END_HANDLE_TH_ERRORS
}

PyObject* subsample(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x, coefficient, bias;
  autograd::Kernel kernel;
  c10::string_view squash;
  if (!read_all(values, count, &x, &coefficient, &bias, &kernel, &squash) ||
      !of_one_dtype({x, coefficient, bias})) {
    return not_plain();
  }
  return answer([&] { return autograd::subsample(x, coefficient, bias, kernel, squash); });
  END_HANDLE_TH_ERRORS
}

// Whether there is nothing for cuda_cnn/ops to complain of before the running statistics change.
bool plain_batch_norm(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const autograd::BatchNormMode& mode) {
  if (x.dim() < 2 || x.numel() == 0 || mode.eps <= 0 || running_mean.has_value() != running_var.has_value()) {
    return false;
  }
  if (!mode.training) return true;
  const int64_t channels = x.size(1);
  return x.numel() > channels &&
         (!running_mean || (running_mean->numel() == channels && running_var->numel() == channels));
}

// Of a batch's variance: what makes it the unbiased one.
double unbiased(const Tensor& x) {
  const double count = static_cast<double>(x.numel() / x.size(1));
  return count / (count - 1);
}

PyObject* batch_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  OptionalTensor residual, weight, bias, running_mean, running_var;
  autograd::BatchNormMode mode;
  double momentum = 0;
  if (!read_all(values, count, &x, &running_mean, &running_var, &weight, &bias, &mode.training, &momentum,
                &mode.eps, &residual, &mode.relu) ||
      !plain_batch_norm(x, running_mean, running_var, mode)) {
    return not_plain();
  }
  return answer([&] {
    if (!mode.training) {
      return std::get<0>(autograd::batch_norm(x, residual, weight, bias, running_mean, running_var, mode));
    }
    const auto [y, mean, var] = autograd::batch_norm(x, residual, weight, bias, {}, {}, mode);
    if (running_mean) {
      const at::NoGradGuard no_grad;
      follow(*running_mean, mean, momentum, 1);
      follow(*running_var, var, momentum, unbiased(x));
    }
    return y;
  });
  END_HANDLE_TH_ERRORS
}

// aten::native_batch_norm, for the override that stands in its place: (y, mean, 1/sqrt(var + eps)) of the
// batch in the parameters' dtype, the last two empty outside training.
PyObject* native_batch_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  OptionalTensor weight, bias, running_mean, running_var;
  autograd::BatchNormMode mode(false, 0, false);
  double momentum = 0;
  if (!read_all(values, count, &x, &weight, &bias, &running_mean, &running_var, &mode.training, &momentum,
                &mode.eps) ||
      !plain_batch_norm(x, running_mean, running_var, mode)) {
    return not_plain();
  }
  Tensor y, mean, inverse;
  {
    const pybind11::gil_scoped_release no_lock;
    const OptionalTensor none;
    const bool training = mode.training;
    Tensor var;
    std::tie(y, mean, var) = autograd::batch_norm(x, none, weight, bias, training ? none : running_mean,
                                                  training ? none : running_var, mode);
    const auto dtype = weight ? weight->scalar_type() : x.scalar_type();
    if (training && running_mean) {
      // As torch's kernel does: autograd, which has saved the vectors, must not see a new version of them.
      follow(running_mean->variable_data(), mean, momentum, 1);
      follow(running_var->variable_data(), var, momentum, unbiased(x));
    }
    mean = training ? mean.to(dtype) : at::empty({0}, x.options().dtype(dtype));
    inverse = training ? var.add(mode.eps).rsqrt_().to(dtype) : at::empty_like(mean);
  }
  return pybind11::make_tuple(y, mean, inverse).release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef* operator_methods() {
  static PyMethodDef methods[] = {
      CUDA_CNN_EAGER(batch_norm),        CUDA_CNN_EAGER(concat),        CUDA_CNN_EAGER(conv2d),
      CUDA_CNN_EAGER(max_pool2d),        CUDA_CNN_EAGER(subsample),     CUDA_CNN_EAGER(local_response_norm),
      CUDA_CNN_EAGER(native_batch_norm), {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace cuda_cnn::eager
