// What every operator's derivative shares. An operator has three layers at the dispatcher: Autocast casts,
// Autograd records a torch::autograd::Function, and the kernel computes (csrc/ops). A derivative calls
// operators through the dispatcher again, so that it can be differentiated, transformed by torch.func and
// traced, as torch's own can.
#pragma once

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace cuda_cnn::autograd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = at::IntArrayRef;
using SymInts = c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// any(test, arguments…): whether one of the tensors among them passes.
template <class Test, class T>
bool any_of(const Test& test, const T& argument) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return test(argument);
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    return argument && test(*argument);
  } else if constexpr (std::is_same_v<T, at::TensorList>) {
    return std::any_of(argument.begin(), argument.end(), test);
  } else {
    return false;
  }
}
template <class... Arguments>
bool any_requires_grad(const Arguments&... arguments) {
  const auto test = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
  return at::GradMode::is_enabled() && (any_of(test, arguments) || ...);
}
template <class... Arguments>
bool any_has_tangent(const Arguments&... arguments) {
  const auto test = [](const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); };
  return (any_of(test, arguments) || ...);
}

// torch::autograd::Function refuses torch.func's transforms, because most functions compute beside the
// dispatcher, where a transform does not see it. Ours call operators, so the refusal finds none.
class HiddenTransforms {
 public:
  HiddenTransforms() { swap(); }
  HiddenTransforms(const HiddenTransforms&) = delete;
  ~HiddenTransforms() { show(); }
  void show() {
    if (std::exchange(hiding_, false)) swap();
  }

 private:
  void swap() { std::swap(at::functorch::functorchTLSAccessor(), transforms_); }

  std::unique_ptr<at::functorch::FuncTorchTLSBase> transforms_;
  bool hiding_ = true;
};

// struct F : Function<F, &op> gives the derivative of an operator, whose tensors are its first arguments:
//
// save(ctx, result, arguments…) keeps what the gradients need; constants as lists, tuples of numbers or
// bools: compiled autograd makes a lone number dynamic.
//
// gradients(ctx, grads) gives one for each tensor; undefined grads stand for zeros.
template <class F, auto kOperator>
struct Function : torch::autograd::Function<F> {
  static constexpr bool is_traceable = true;

  template <class... Arguments>
  static auto record(const char* op, const Arguments&... arguments) {
    TORCH_CHECK_NOT_IMPLEMENTED(!any_has_tangent(arguments...), op, ": there is no forward-mode derivative");
    if (!any_requires_grad(arguments...)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return kOperator(arguments...);
    }
    HiddenTransforms hidden;
    using Result = decltype(kOperator(arguments...));
    if constexpr (std::is_same_v<Result, Tensor>) {
      return F::apply(arguments..., &hidden);
    } else {
      return from_list<Result>(F::apply(arguments..., &hidden),
                               std::make_index_sequence<std::tuple_size_v<Result>>());
    }
  }

  // Called by torch, from apply.
  template <class... Arguments>
  static auto forward(AutogradContext* ctx, const Arguments&... arguments_and_hidden) {
    return forward_first(ctx, std::forward_as_tuple(arguments_and_hidden...),
                         std::make_index_sequence<sizeof...(Arguments) - 1>());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kMostConstants = 8;  // they want a place each, and torch allows more
    variable_list result = F::gradients(ctx, grads);
    result.resize(result.size() + kMostConstants);
    return result;
  }

 private:
  template <class Arguments, size_t... kIndex>
  static auto forward_first(AutogradContext* ctx, const Arguments& arguments,
                            std::index_sequence<kIndex...>) {
    std::get<sizeof...(kIndex)>(arguments)->show();
    const at::AutoGradMode as_it_was(true);  // apply() turns it off, also for the transforms around this one
    const at::AutoDispatchBelowADInplaceOrView below;
    auto result = kOperator(std::get<kIndex>(arguments)...);
    ctx->set_materialize_grads(false);
    F::save(ctx, result, std::get<kIndex>(arguments)...);
    if constexpr (std::is_same_v<decltype(result), Tensor>) {
      return result;
    } else {
      return to_list(result);
    }
  }

  template <class... Tensors>
  static variable_list to_list(const std::tuple<Tensors...>& results) {
    return std::apply([](const auto&... result) { return variable_list{result...}; }, results);
  }

  template <class Result, size_t... kIndex>
  static Result from_list(variable_list&& results, std::index_sequence<kIndex...>) {
    return {std::move(results[kIndex])...};
  }
};

// What a gradient that no graph will be made of is computed under: it needs no record, nor a view its base.
class NoGraph {
 public:
  explicit NoGraph(const Tensor& dy) {
    if (!at::GradMode::is_enabled() && !any_has_tangent(dy)) below_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;
};

// A schema's int[2] lets a list of any length through.
template <class T>
std::array<T, 2> pair(const char* op, const char* name, c10::ArrayRef<T> values) {
  TORCH_CHECK(values.size() == 2, op, ": ", name,
              " must either be a single int, or a tuple of two ints, got ", values);
  return {values[0], values[1]};
}

// cuda_cnn::<name>, through the dispatcher.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("cuda_cnn::") + name).c_str(), "")
      .typed<Signature>();
}

}  // namespace cuda_cnn::autograd
