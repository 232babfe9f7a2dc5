#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

// torch.cat passes over tensors of shape (0,) whatever the other shapes are.
bool is_legacy_empty(const std::vector<c10::SymInt>& shape) { return shape.size() == 1 && shape[0] == 0; }

// The part of dy that each input gave: views, as torch.cat's gradients are.
struct ConcatBackward : Formula {
  static constexpr const char* kName = "ConcatBackward";
  std::vector<std::vector<c10::SymInt>> shapes;
  int64_t dim;

  variable_list operator()(const Derivative& of) const {
    const Tensor& dy = of.grads[0];
    variable_list result(shapes.size());
    if (!dy.defined()) return result;
    const int64_t along = at::maybe_wrap_dim(dim, dy.dim());
    c10::SymInt start = 0;
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (is_legacy_empty(shapes[i])) {
        if (of.wanted(i)) result[i] = dy.new_zeros_symint(shapes[i]);
        continue;
      }
      const c10::SymInt& extent = shapes[i][along];
      if (of.wanted(i)) result[i] = dy.narrow_symint(along, start, extent);
      start += extent;
    }
    return result;
  }
};

Tensor concat_autograd(at::TensorList tensors, int64_t dim) {
  return record<ConcatBackward>(
      "concat", [&] { return autograd::concat(tensors, dim); },
      [&](auto& node, const Tensor&) {
        for (const Tensor& tensor : tensors) node.formula.shapes.push_back(tensor.sym_sizes().vec());
        node.formula.dim = dim;
      },
      tensors);
}

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) { library.impl("concat", &concat_autograd); }

}  // namespace cuda_cnn::autograd
