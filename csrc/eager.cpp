// The short way from Python to the operators. Plain tensors and plain numbers go to the dispatcher as they
// are, without the boxing of torch.ops, which takes longer than a small kernel. To anything else (a subclass,
// a mode, a traced or symbolic value, a string, a mistake) the answer is NotImplemented: the caller in
// cuda_cnn/ops then does it at length.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/operators.h"

namespace cuda_cnn {
namespace {

using at::Tensor;
using autograd::Geometry;
using autograd::OptionalTensor;
using autograd::Window;

bool whole_number(PyObject* value, int64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  *out = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

// read(argument, &value): false for what is not plain.
bool read(PyObject* value, Tensor* out) {
  if (!THPVariable_CheckExact(value)) return false;
  *out = THPVariable_Unpack(value);
  return true;
}
bool read(PyObject* value, OptionalTensor* out) { return value == Py_None || read(value, &out->emplace()); }
bool read(PyObject* value, bool* out) {
  *out = value == Py_True;
  return PyBool_Check(value);
}
bool read(PyObject* value, int64_t* out) { return whole_number(value, out); }
bool read(PyObject* value, c10::SymInt* out) {
  int64_t number = 0;
  if (!whole_number(value, &number)) return false;
  *out = number;
  return true;
}
bool read(PyObject* value, c10::string_view* out) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_CheckExact(value) ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
  if (text == nullptr) return false;
  *out = c10::string_view(text, size);
  return true;
}
bool read(PyObject* value, double* out) {
  if (PyFloat_CheckExact(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  int64_t number = 0;
  if (!whole_number(value, &number)) return false;
  *out = static_cast<double>(number);
  return true;
}
// A number, or two of them.
template <class T>
bool read(PyObject* value, std::array<T, 2>* out) {
  if (PyTuple_CheckExact(value)) {
    return PyTuple_GET_SIZE(value) == 2 && read(PyTuple_GET_ITEM(value, 0), &(*out)[0]) &&
           read(PyTuple_GET_ITEM(value, 1), &(*out)[1]);
  }
  if (!read(value, &(*out)[0])) return false;
  (*out)[1] = (*out)[0];
  return true;
}
bool read(PyObject* value, std::vector<Tensor>* out) {
  if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  out->resize(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read(PySequence_Fast_GET_ITEM(value, i), &(*out)[i])) return false;
  }
  return true;
}

// Whether each of the positional arguments is plain, and nobody but the dispatcher must see the call.
template <class... Values>
bool read_all(PyObject* const* values, Py_ssize_t count, Values*... out) {
  if (count != sizeof...(out)) return false;
  if (at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing()) return false;
  return (read(*values++, out) && ...);
}

PyObject* not_plain() { return Py_NewRef(Py_NotImplemented); }

// run() without Python's lock.
template <class Run>
PyObject* answer(const Run& run) {
  Tensor y;
  {
    const pybind11::gil_scoped_release no_lock;
    y = run();
  }
  return THPVariable_Wrap(std::move(y));
}

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

// A running statistic moved towards a batch's.
void follow(const Tensor& running, const Tensor& value, double momentum, double factor) {
  running.mul_(1 - momentum).add_(value, momentum * factor);
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

// What tells whether tensors (or None) are what they were: their memory, versions and dtypes, as bytes. None
// where that is not to be known, of tensors without a version.
PyObject* versions(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  struct Version {
    const void* memory;
    int64_t version, dtype;
  };
  std::vector<Version> versions;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (values[i] == Py_None) continue;
    TORCH_CHECK_TYPE(THPVariable_Check(values[i]), "versions: expected tensors or None");
    const Tensor& tensor = THPVariable_Unpack(values[i]);
    if (tensor.is_inference()) Py_RETURN_NONE;
    versions.push_back({tensor.data_ptr(), tensor._version(), static_cast<int64_t>(tensor.scalar_type())});
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(versions.data()),
                                   static_cast<Py_ssize_t>(versions.size() * sizeof(Version)));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef* eager_methods() {
#define CUDA_CNN_EAGER(name)                                                                          \
  {                                                                                                   \
    #name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&name)), METH_FASTCALL, nullptr \
  }
  static PyMethodDef methods[] = {
      CUDA_CNN_EAGER(batch_norm),        CUDA_CNN_EAGER(concat),    CUDA_CNN_EAGER(conv2d),
      CUDA_CNN_EAGER(max_pool2d),        CUDA_CNN_EAGER(subsample), CUDA_CNN_EAGER(local_response_norm),
      CUDA_CNN_EAGER(native_batch_norm), CUDA_CNN_EAGER(versions),  {nullptr, nullptr, 0, nullptr}};
#undef CUDA_CNN_EAGER
  return methods;
}

}  // namespace cuda_cnn
