#include <ATen/ops/as_strided_native.h>

#include "autograd/operators.h"

namespace cuda_cnn::autograd {
namespace {

// Whether an operator of dy would go straight to torch's kernel: nobody between sees it (a mode, a transform,
// a subclass, autograd).
bool goes_to_kernel(const Tensor& dy) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto keys = (dy.key_set() | local.included_) - local.excluded_ - c10::autocast_dispatch_keyset -
                    c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) ||
         keys == c10::DispatchKeySet(c10::DispatchKey::CUDA);
}

// dy.narrow(), without its way through three operators, which takes longer than the view.
Tensor narrow(const Tensor& dy, int64_t dim, const c10::SymInt& start, const c10::SymInt& length) {
  if (!goes_to_kernel(dy)) return dy.narrow_symint(dim, start, length);
  at::DimVector sizes(dy.sizes());
  sizes[dim] = length.expect_int();
  const int64_t offset = dy.storage_offset() + start.expect_int() * dy.stride(dim);
  return at::native::as_strided_tensorimpl(dy, sizes, dy.strides(), offset);
}

// The part of dy that each input gave: views, as torch.cat's gradients are.
struct Concat : Function<Concat, &concat> {
  static void save(AutogradContext* ctx, const Tensor& y, at::TensorList tensors, int64_t dim) {
    const int64_t along = at::maybe_wrap_dim(dim, y.dim());
    // The dimension, and an extent for each: -1 of a shape of (0,), which torch.cat passes over whatever the
    // others are. One entry, as each takes a tenth of a small call.
    std::vector<at::IValue> cut;
    cut.reserve(tensors.size() + 1);
    cut.emplace_back(along);
    for (const Tensor& t : tensors) {
      cut.emplace_back(t.dim() == 1 && t.sym_size(0) == 0 ? c10::SymInt(-1) : t.sym_size(along));
    }
    ctx->saved_data["cut"] = c10::ivalue::Tuple::create(std::move(cut));
  }

  static variable_list gradients(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dy = grads[0];
    const auto& cut = ctx->saved_data["cut"].toTupleRef().elements();
    const int64_t along = cut[0].toInt();
    variable_list result(cut.size() - 1);
    if (!dy.defined()) return result;
    const NoGraph no_graph(dy);
    c10::SymInt start = 0;
    for (size_t i = 0; i < result.size(); ++i) {
      const c10::SymInt extent = cut[i + 1].toSymInt();
      const bool passed_over = extent == -1;
      if (ctx->needs_input_grad(i)) {
        result[i] = passed_over ? dy.new_empty({0}) : narrow(dy, along, start, extent);
      }
      if (!passed_over) start += extent;
    }
    return result;
  }
};

Tensor concat_autograd(at::TensorList tensors, int64_t dim) { return Concat::record("concat", tensors, dim); }

}  // namespace

TORCH_LIBRARY_IMPL(cuda_cnn, Autograd, library) { library.impl("concat", &concat_autograd); }

}  // namespace cuda_cnn::autograd
