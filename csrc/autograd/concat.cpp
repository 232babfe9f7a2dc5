#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

// The part of dy that each input gave: views, as torch.cat's gradients are.
struct Concat : Function<Concat, &concat> {
  static void save(AutogradContext* ctx, const Tensor& y, at::TensorList tensors, int64_t dim) {
    const int64_t along = at::maybe_wrap_dim(dim, y.dim());
    // -1: a shape of (0,), which torch.cat passes over whatever the others are.
    std::vector<c10::SymInt> extents;
    for (const Tensor& t : tensors) {
      extents.push_back(t.dim() == 1 && t.sym_size(0) == 0 ? c10::SymInt(-1) : t.sym_size(along));
    }
    ctx->saved_data["extents"] = std::move(extents);
    ctx->saved_data["dim"] = std::vector<int64_t>{along};
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dy = grads[0];
    const auto extents = ctx->saved_data["extents"].toSymIntVector();
    const int64_t along = ctx->saved_data["dim"].toIntVector()[0];
    variable_list result(extents.size());
    if (!dy.defined()) return result;
    // A view that no graph will be made of needs no record of its base.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    c10::SymInt start = 0;
    for (size_t i = 0; i < extents.size(); ++i) {
      const bool passed_over = extents[i] == -1;
      if (ctx->needs_input_grad(i)) {
        result[i] = passed_over ? dy.new_empty({0}) : dy.narrow_symint(along, start, extents[i]);
      }
      if (!passed_over) start += extents[i];
    }
    return result;
  }
};

Tensor concat_autograd(at::TensorList tensors, int64_t dim) { return Concat::record("concat", tensors, dim); }

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) { library.impl("concat", &concat_autograd); }

}  // namespace cuda_cnn::autograd
