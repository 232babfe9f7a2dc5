// What the short ways in from Python share: reading plain arguments, and answering.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/operators.h"

namespace cuda_cnn::eager {

using at::Tensor;
using autograd::OptionalTensor;

inline bool whole_number(PyObject* value, int64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  *out = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

// read(argument, &value): false for what is not plain.
inline bool read(PyObject* value, Tensor* out) {
  if (!THPVariable_CheckExact(value)) return false;
  *out = THPVariable_Unpack(value);
  return true;
}
inline bool read(PyObject* value, OptionalTensor* out) {
  return value == Py_None || read(value, &out->emplace());
}
inline bool read(PyObject* value, bool* out) {
  *out = value == Py_True;
  return PyBool_Check(value);
}
inline bool read(PyObject* value, int64_t* out) { return whole_number(value, out); }
inline bool read(PyObject* value, c10::SymInt* out) {
  int64_t number = 0;
  if (!whole_number(value, &number)) return false;
  *out = number;
  return true;
}
inline bool read(PyObject* value, c10::string_view* out) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_CheckExact(value) ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
  if (text == nullptr) return false;
  *out = c10::string_view(text, size);
  return true;
}
inline bool read(PyObject* value, double* out) {
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
inline bool read(PyObject* value, std::vector<Tensor>* out) {
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

inline PyObject* not_plain() { return Py_NewRef(Py_NotImplemented); }

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

// A row of a table of functions.
#define CUDA_CNN_EAGER(name) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&name)), METH_FASTCALL, nullptr}

}  // namespace cuda_cnn::eager
