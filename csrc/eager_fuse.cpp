// The short way from a fused graph's layers (cuda_cnn/fuse/layers.py) to the operators: in inference a layer
// is one step from Python. What was kept for it is looked up here, and used if the tensors that it was made
// from are what they were. To anything else the answer is NotImplemented, and layers.py does it at length.
#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>

#include "eager.h"
#include "eager_read.h"

namespace cuda_cnn::eager {
namespace {

using autograd::Fusion;
using autograd::Geometry;

// A torch.nn.Module's own attributes. Names are Python's interned strings; results are borrowed, null where
// there is none.
class Module {
 public:
  explicit Module(PyObject* module)
      : dict_(pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr))) {
    if (!dict_) PyErr_Clear();
  }

  PyObject* attribute(PyObject* name) const { return get(dict_.ptr(), name); }
  PyObject* parameter(PyObject* name) const {
    static PyObject* const kTable = PyUnicode_InternFromString("_parameters");
    return get(attribute(kTable), name);
  }
  PyObject* buffer(PyObject* name) const {
    static PyObject* const kTable = PyUnicode_InternFromString("_buffers");
    return get(attribute(kTable), name);
  }

 private:
  static PyObject* get(PyObject* dict, PyObject* name) {
    return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
  }

  pybind11::object dict_;
};

// What tells whether values are what they were: tensors by their memory, versions and dtypes.
class Versions {
 public:
  void add(const Tensor& tensor) {
    values_.push_back({tensor.data_ptr(), tensor._version(), static_cast<int64_t>(tensor.scalar_type())});
  }
  void add(double number) {
    int64_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    values_.push_back({nullptr, bits, -1});
  }
  void add(at::ScalarType dtype) { values_.push_back({nullptr, static_cast<int64_t>(dtype), -2}); }

  // Of a layer's parameter or buffer: false if there is none, or what is made from it is made anew every
  // time.
  bool add_fixed(PyObject* source) {
    if (source == Py_None) return true;
    Tensor tensor;
    if (source == nullptr || !read(source, &tensor) || tensor.is_inference() ||
        autograd::any_requires_grad(tensor)) {
      return false;
    }
    add(tensor);
    return true;
  }
  bool add_number(PyObject* source) {
    double number = 0;
    if (source == nullptr || !read(source, &number)) return false;
    add(number);
    return true;
  }

  const char* bytes() const { return reinterpret_cast<const char*>(values_.data()); }
  Py_ssize_t size() const { return static_cast<Py_ssize_t>(values_.size() * sizeof(Version)); }

 private:
  struct Version {
    const void* memory;
    int64_t version, dtype;
  };
  c10::SmallVector<Version, 8> values_;
};

// versions(value, …) as bytes, for layers._once. None where it is not to be known, of tensors without a
// version.
PyObject* versions(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Versions versions;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (values[i] == Py_None || versions.add_number(values[i])) continue;
    if (THPDtype_Check(values[i])) {
      versions.add(reinterpret_cast<THPDtype*>(values[i])->scalar_type);
      continue;
    }
    TORCH_CHECK_TYPE(THPVariable_Check(values[i]), "versions: expected tensors, numbers, dtypes or None");
    const Tensor& tensor = THPVariable_Unpack(values[i]);
    if (tensor.is_inference()) Py_RETURN_NONE;
    versions.add(tensor);
  }
  return PyBytes_FromStringAndSize(versions.bytes(), versions.size());
  END_HANDLE_TH_ERRORS
}

// What layers._kept, id of a module -> (versions, value, …), has of these versions; borrowed, or null.
PyObject* find_kept(PyObject* kept, PyObject* module, const Versions& versions) {
  const auto id = pybind11::reinterpret_steal<pybind11::object>(PyLong_FromVoidPtr(module));
  PyObject* const entry = PyDict_Check(kept) ? PyDict_GetItemWithError(kept, id.ptr()) : nullptr;
  if (entry == nullptr) return nullptr;
  PyObject* const bytes = PyTuple_GET_ITEM(entry, 0);
  const bool same = PyBytes_GET_SIZE(bytes) == versions.size() &&
                    std::memcmp(PyBytes_AS_STRING(bytes), versions.bytes(), versions.size()) == 0;
  return same ? PyTuple_GET_ITEM(entry, 1) : nullptr;
}

// The sources of layers.frozen and layers._folded.
bool add_norm(PyObject* norm, Versions* versions) {
  static PyObject *const kMean = PyUnicode_InternFromString("running_mean"),
                         *const kVar = PyUnicode_InternFromString("running_var"),
                         *const kWeight = PyUnicode_InternFromString("weight"),
                         *const kBias = PyUnicode_InternFromString("bias"),
                         *const kEps = PyUnicode_InternFromString("eps");
  const Module module(norm);
  return versions->add_fixed(module.buffer(kMean)) && versions->add_fixed(module.buffer(kVar)) &&
         versions->add_fixed(module.parameter(kWeight)) && versions->add_fixed(module.parameter(kBias)) &&
         versions->add_number(module.attribute(kEps));
}

// frozen(kept, norm, x): layers.frozen's scale and shift.
PyObject* frozen(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  Versions versions;
  if (count != 3 || !read(values[2], &x) || !add_norm(values[1], &versions)) return not_plain();
  versions.add(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  PyObject* const found = find_kept(values[0], values[1], versions);
  return found ? Py_NewRef(found) : not_plain();
  END_HANDLE_TH_ERRORS
}

// A convolution whose weight, with a norm folded in, is kept packed.
struct Packed {
  Tensor weight, packed;
  OptionalTensor bias;
  Geometry geometry;

  bool find(PyObject* kept, PyObject* conv, PyObject* norm) {
    static PyObject *const kWeight = PyUnicode_InternFromString("weight"),
                           *const kBias = PyUnicode_InternFromString("bias"),
                           *const kStride = PyUnicode_InternFromString("stride"),
                           *const kPadding = PyUnicode_InternFromString("padding"),
                           *const kDilation = PyUnicode_InternFromString("dilation"),
                           *const kGroups = PyUnicode_InternFromString("groups");
    const Module module(conv);
    PyObject *const own_weight = module.parameter(kWeight), *const own_bias = module.parameter(kBias);
    Versions versions;
    if (!versions.add_fixed(own_weight)) return false;
    const auto plain = [](PyObject* value, auto* out) { return value != nullptr && read(value, out); };
    if (norm == Py_None) {
      PyObject* const found = find_kept(kept, conv, versions);
      if (!plain(found, &packed) || !plain(own_weight, &weight) || !plain(own_bias, &bias)) return false;
    } else {
      if (!versions.add_fixed(own_bias) || !add_norm(norm, &versions)) return false;
      PyObject* const found = find_kept(kept, conv, versions);
      if (found == nullptr || !PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != 3 ||
          !read(PyTuple_GET_ITEM(found, 0), &weight) || !read(PyTuple_GET_ITEM(found, 1), &bias) ||
          !read(PyTuple_GET_ITEM(found, 2), &packed)) {
        return false;
      }
    }
    return plain(module.attribute(kStride), &geometry.stride) &&
           plain(module.attribute(kPadding), &geometry.padding) &&
           plain(module.attribute(kDilation), &geometry.dilation) &&
           plain(module.attribute(kGroups), &geometry.groups);
  }

  // The output's extents for an input of four dimensions.
  std::array<int64_t, 4> extents(const Tensor& x) const {
    std::array<int64_t, 4> size{x.size(0), weight.size(0), 0, 0};
    for (int i = 0; i < 2; ++i) {
      const int64_t window = geometry.dilation[i].expect_int() * (weight.size(2 + i) - 1) + 1;
      const int64_t padded = x.size(2 + i) + 2 * geometry.padding[i].expect_int();
      size[2 + i] = (padded - window) / geometry.stride[i].expect_int() + 1;
    }
    return size;
  }
};

// Whether no derivative is wanted and no other precision: layers._inference.
template <class... Tensors>
bool is_inference(const Tensor& x, const Tensors&... others) {
  return x.dim() == 4 &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !at::autocast::is_autocast_enabled(x.device().type()) &&
         !autograd::any_requires_grad(x, others...) && !autograd::any_has_tangent(x, others...);
}

// layers._nhwc
Tensor nhwc(const Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(at::MemoryFormat::ChannelsLast); }

// conv(kept, x, module, norm, scale, shift, in_relu, residual, relu): layers.conv
PyObject* conv(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  Fusion f;
  Packed p;
  if (count != 9 || !read_all(values + 1, 1, &x) ||
      !read_all(values + 4, 5, &f.in_scale, &f.in_shift, &f.in_relu, &f.residual, &f.out_relu) ||
      !p.find(values[0], values[2], values[3]) ||
      !is_inference(x, p.bias, f.in_scale, f.in_shift, f.residual)) {
    return not_plain();
  }
  if (f.residual && (f.residual->scalar_type() != x.scalar_type() ||
                     f.residual->sizes() != at::IntArrayRef(p.extents(x)))) {
    return not_plain();  // a sum with a broadcast, or of another dtype
  }
  f.bias = p.bias;
  return answer([&] {
    const at::AutoDispatchBelowAutograd below;
    return autograd::conv2d_packed(nhwc(x), p.weight, p.packed, f, p.geometry);
  });
  END_HANDLE_TH_ERRORS
}

// append_conv(kept, maps, buffer, x, module, norm, scale, shift, in_relu, relu): layers.append_conv
PyObject* append_conv(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor maps, buffer, x;
  Fusion f;
  Packed p;
  if (count != 10 || !read_all(values + 1, 3, &maps, &buffer, &x) ||
      !read_all(values + 6, 4, &f.in_scale, &f.in_shift, &f.in_relu, &f.out_relu) ||
      !p.find(values[0], values[4], values[5]) || !is_inference(x, p.bias, f.in_scale, f.in_shift, maps) ||
      x.scalar_type() != buffer.scalar_type()) {
    return not_plain();
  }
  f.bias = p.bias;
  return answer([&] {
    const at::AutoDispatchBelowAutograd below;
    const int64_t first = maps.size(1), end = first + p.weight.size(0);
    autograd::conv2d_packed_(buffer.slice(1, first, end), nhwc(x), p.weight, p.packed, f, p.geometry);
    return buffer.slice(1, 0, end);
  });
  END_HANDLE_TH_ERRORS
}

// state(module), for FusedForward: of every layer below it as bytes which one it is, its mode, and whether it
// has hooks.
PyObject* state(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject *const kModules = PyUnicode_InternFromString("_modules"), *const kTraining =
                                                                                PyUnicode_InternFromString(
                                                                                    "training");
  static PyObject* const kHooks[] = {
      PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
  if (count != 1) return not_plain();
  std::vector<uintptr_t> state;
  std::vector<PyObject*> left{values[0]};
  while (!left.empty()) {
    PyObject* const layer = left.back();
    left.pop_back();
    const Module module(layer);
    PyObject *const training = module.attribute(kTraining), *const below = module.attribute(kModules);
    if (training == nullptr || !PyBool_Check(training) || below == nullptr || !PyDict_Check(below)) {
      return not_plain();
    }
    uintptr_t hooks = 0;
    for (PyObject* name : kHooks) {
      PyObject* const found = module.attribute(name);
      if (found == nullptr || !PyDict_Check(found)) return not_plain();
      hooks |= PyDict_GET_SIZE(found) != 0;
    }
    if (layer == values[0]) hooks = 0;  // those of the network itself run around its graph
    state.insert(state.end(), {reinterpret_cast<uintptr_t>(layer), training == Py_True, hooks});
    PyObject *name = nullptr, *child = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(below, &at, &name, &child);) {
      if (child != Py_None) left.push_back(child);
    }
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(state.data()),
                                   static_cast<Py_ssize_t>(state.size() * sizeof(uintptr_t)));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef* fuse_methods() {
  static PyMethodDef methods[] = {CUDA_CNN_EAGER(append_conv), CUDA_CNN_EAGER(conv),
                                  CUDA_CNN_EAGER(frozen),      CUDA_CNN_EAGER(state),
                                  CUDA_CNN_EAGER(versions),    {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace cuda_cnn::eager
