// What every operator's derivative shares. An operator has three layers at the dispatcher: Autocast casts,
// Autograd records a node, and the kernel computes (csrc/ops). A node's formula calls operators through the
// dispatcher again, so that its gradients can be differentiated, transformed by torch.func and traced, as
// torch's own can.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace cuda_cnn::autograd {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = at::IntArrayRef;
using SymInts = c10::SymIntArrayRef;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What a formula sees while it runs.
struct Derivative {
  const variable_list& grads;  // of the outputs; undefined where no gradient came
  variable_list saved;         // in the order of save()
  torch::autograd::Node& node;

  bool wanted(size_t input) const { return node.task_should_compute_output(input); }
};

// A derivative: `static constexpr const char* kName`, `variable_list operator()(const Derivative&) const`,
// which gives one gradient for each input, and members for whatever is no tensor.
struct Formula {
  static constexpr size_t kOutputs = 1;  // so many results are differentiable, the first ones
};

template <class F>
class Node final : public torch::autograd::Node {
 public:
  F formula;

  void save(std::initializer_list<OptionalTensor> inputs) {
    for (const OptionalTensor& input : inputs) saved_.emplace_back(input, /*is_output=*/false);
  }
  void save_output(const Tensor& output) { saved_.emplace_back(output, /*is_output=*/true); }

  std::string name() const override { return F::kName; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : saved_) saved.reset_data();
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Derivative derivative{grads, {}, *this};
    derivative.saved.reserve(saved_.size());
    for (const SavedVariable& saved : saved_) derivative.saved.push_back(saved.unpack(getptr()));
    return formula(derivative);
  }

 private:
  std::vector<SavedVariable> saved_;
};

// Older torch holds nodes by std::shared_ptr, newer by its own intrusive pointer.
template <class F>
auto make_node() {
  using Base = torch::autograd::Node;
  if constexpr (std::is_same_v<decltype(std::declval<Base&>().getptr()), std::shared_ptr<Base>>) {
    return std::shared_ptr<Node<F>>(new Node<F>(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node<F>>();
  }
}

template <size_t kOutputs, class NodePtr>
void set_history(const Tensor& result, const NodePtr& node) {
  torch::autograd::set_history(result, node);
}
template <size_t kOutputs, class NodePtr, class... Tensors>
void set_history(const std::tuple<Tensors...>& results, const NodePtr& node) {
  size_t i = 0;
  std::apply(
      [&](const auto&... result) {
        ((i++ < kOutputs ? torch::autograd::set_history(result, node) : void()), ...);
      },
      results);
}

inline bool has_tangent(const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
inline bool has_tangent(const OptionalTensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
inline bool has_tangent(at::TensorList tensors) {
  return torch::autograd::isFwGradDefinedTensorList(tensors);
}

// record<F>("conv2d", run, save, inputs…): run() below autograd; where gradients are recorded its results get
// a node over the inputs, which save(node, results) fills.
template <class F, class Run, class Save, class... Inputs>
auto record(const char* op, const Run& run, const Save& save, const Inputs&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), op, ": there is no forward-mode derivative");
  const bool recording = torch::autograd::compute_requires_grad(inputs...);
  auto results = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return run();
  }();
  if (recording) {
    auto node = make_node<F>();
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    set_history<F::kOutputs>(results, node);
    save(*node, results);
  }
  return results;
}

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
