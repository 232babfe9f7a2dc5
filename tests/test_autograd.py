"""What autograd, torch.func and the dispatcher expect of every operator's derivative, beside its values."""

import threading

import pytest
import torch
from helpers import assert_bitwise, reals
from torch._dynamo import compiled_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cuda_cnn import _C, nn
from cuda_cnn import functional as F

STATISTICS = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
# name: (function, shapes of its differentiable inputs, name of its torch::autograd::Function)
OPERATORS = {
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        [(2, 4, 6, 6), (5, 4, 3, 3), (5,)],
        "Conv2d",
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2), [(2, 4, 7, 7)], "MaxPool2dWithTaps"),
    "local_response_norm": (
        lambda x: F.local_response_norm(x, 3, 0.5),
        [(2, 4, 3, 3)],
        "LocalResponseNorm",
    ),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, relu=True),
        [(3, 4, 3, 3), (4,), (4,)],
        "BatchNorm",
    ),
    "batch_norm_eval": (
        lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b),
        [(3, 4, 3, 3), (4,), (4,)],
        "BatchNorm",
    ),
    "concat": (lambda x, y: F.concat([x, y], 1), [(2, 4, 3, 3), (2, 3, 3, 3)], "Concat"),
    "subsample": (lambda x, k, b: F.subsample(x, k, b, 2), [(2, 4, 6, 6), (4,), (4,)], "Subsample"),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    """(function, its inputs, the name of its node)"""
    function, shapes, node = OPERATORS[request.param]
    inputs = [reals(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    return function, inputs, node


def gradients(function, inputs, dy=None, **options):
    y = function(*inputs)
    dy = reals(*y.shape, dtype=y.dtype, seed=9) if dy is None else dy
    return torch.autograd.grad(y, inputs, dy, **options)


def assert_same(ours, expected):
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_bitwise(a, b, f"gradient {i}")


def test_the_direct_call_of_the_operator_is_the_function(operator):
    """torch.ops, without the public function and its short way in, has the same derivative."""
    function, inputs, node = operator
    y = function(*inputs)
    assert y.grad_fn.name().endswith(f"::{node}>")
    assert len(y.grad_fn.next_functions) >= len(inputs)


def test_hooks_see_and_change_gradients(operator):
    function, inputs, _ = operator
    plain, seen = gradients(function, inputs), []
    y = function(*inputs)
    y.register_hook(lambda g: 2 * g)
    y.grad_fn.register_prehook(lambda grads: seen.append(len(grads)))
    y.grad_fn.register_hook(lambda results, grads: seen.append(len(results)))
    doubled = torch.autograd.grad(y, inputs, reals(*y.shape, dtype=y.dtype, seed=9))
    assert_same(doubled, [2 * g for g in plain])
    assert seen[0] >= 1 and seen[1] >= len(inputs)


def test_saved_tensors_go_through_the_hooks(operator):
    function, inputs, _ = operator
    plain, packed, unpacked = gradients(function, inputs), [], []

    def pack(t):
        packed.append(t)
        return len(packed) - 1

    def unpack(i):
        unpacked.append(i)
        return packed[i]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = function(*inputs)
    assert_same(torch.autograd.grad(y, inputs, reals(*y.shape, dtype=y.dtype, seed=9)), plain)
    assert sorted(unpacked) == list(range(len(packed)))
    if function is not OPERATORS["concat"][0]:
        assert packed


def test_the_graph_is_freed_and_kept(operator):
    function, inputs, _ = operator
    y = function(*inputs)
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, inputs, dy), first)
    if function is not OPERATORS["concat"][0]:  # it saves nothing that could be freed
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("name", ["conv2d", "local_response_norm", "batch_norm", "subsample"])
def test_a_saved_tensor_that_changed_is_an_error(name):
    function, shapes, _ = OPERATORS[name]
    inputs = [reals(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    y = function(*inputs)
    with torch.no_grad():
        inputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_changed_is_an_error_where_it_was_saved():
    x, k, b = (reals(*s, dtype=torch.float64).requires_grad_() for s in OPERATORS["subsample"][1])
    y = F.subsample(x, k, b, 2)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_anomaly_mode_names_the_node(operator):
    function, inputs, node = operator
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning, match=f"::{node}>"):
        y = function(*inputs)
        with pytest.raises(RuntimeError, match=f"::{node}>.* returned nan"):
            y.backward(torch.full_like(y, float("nan")))


def test_checkpointing_recomputes_the_same(operator):
    function, inputs, _ = operator
    plain = gradients(function, inputs)
    again = gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), inputs)
    assert_same(again, plain)
    y = checkpoint(function, *inputs, use_reentrant=True)
    y.backward(reals(*y.shape, dtype=y.dtype, seed=9))
    assert_same([t.grad for t in inputs], plain)


def test_gradients_of_any_strides(operator):
    function, inputs, _ = operator
    y = function(*inputs)
    dense = reals(*y.shape, dtype=y.dtype, seed=9)
    wide = torch.stack([dense, dense * 7], -1)[..., 0]
    assert not wide.is_contiguous()
    assert_same(gradients(function, inputs, wide), gradients(function, inputs, dense))
    expanded = torch.ones((), dtype=y.dtype).expand(y.shape)
    assert_same(gradients(function, inputs, expanded), gradients(function, inputs, torch.ones_like(y)))


def test_only_what_is_asked_for_is_computed(operator):
    function, inputs, _ = operator
    expected = gradients(function, inputs)
    for i, tensor in enumerate(inputs):
        others = [t if t is tensor else t.detach() for t in inputs]
        y = function(*others)
        (gradient,) = torch.autograd.grad(y, tensor, reals(*y.shape, dtype=y.dtype, seed=9))
        assert_bitwise(gradient, expected[i], f"gradient {i}")


def test_threads_share_the_parameters(operator):
    function, inputs, _ = operator
    expected, results = gradients(function, inputs), [None] * 4

    def work(i):
        results[i] = gradients(function, inputs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same(result, expected)


def test_forward_mode_is_refused(operator):
    """Not a tangent of silent zeros."""
    function, inputs, _ = operator
    tensors = tuple(t.detach() for t in inputs)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, tensors, tensors)


def test_double_backward_through_functorch_is_autograds(operator):
    function, inputs, _ = operator

    def loss(*t):
        return function(*t).pow(3).sum()

    def norm(*t):
        return sum(g.square().sum() for g in torch.func.grad(loss, argnums=tuple(range(len(t))))(*t))

    ours = torch.func.grad(norm, argnums=tuple(range(len(inputs))))(*(t.detach() for t in inputs))
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_autograd_traces_the_backward(operator):
    function, inputs, _ = operator
    expected, graphs = gradients(function, inputs), []

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend="eager", fullgraph=True)

    y = function(*inputs)
    with compiled_autograd._enable(compiler):
        y.backward(reals(*y.shape, dtype=y.dtype, seed=9))
    assert_same([t.grad for t in inputs], expected)
    assert len(graphs) == 1


def test_inference_mode(operator):
    function, inputs, _ = operator
    with torch.inference_mode():
        y = function(*inputs)
    assert y.is_inference() and y.grad_fn is None
    assert_bitwise(y.clone(), function(*inputs).detach())


def test_modes_see_the_call(operator):
    function, inputs, _ = operator
    functions, operators = [], []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            functions.append(func)
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Functions():
        function(*inputs)
    with Operators():
        function(*inputs)
    assert any(getattr(F, f.__name__, None) is f for f in functions)
    assert "cuda_cnn" in operators


def test_a_subclass_is_not_read_past():
    class Ours(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return (
                "ours"
                if func is F.max_pool2d
                else super().__torch_function__(func, types, args, kwargs or {})
            )

    assert F.max_pool2d(torch.ones(1, 1, 4, 4).as_subclass(Ours), 2) == "ours"


def test_a_traced_call_is_in_the_trace(operator):
    function, inputs, _ = operator
    inputs = [t.detach() for t in inputs]
    traced = torch.jit.trace(function, inputs, check_trace=False)
    assert "cuda_cnn::" in str(traced.graph)
    others = [t + 1 for t in inputs]
    assert_bitwise(traced(*others), function(*others))


@pytest.mark.parametrize("arguments", [(), (1, 2, 3), ("x", None, 2), (torch.ones(2),)])
def test_the_short_way_declines_what_is_not_plain(arguments):
    for name in ("batch_norm", "concat", "conv2d", "local_response_norm", "max_pool2d", "subsample"):
        assert getattr(_C.eager, name)(*arguments) is NotImplemented


@pytest.mark.parametrize("requires_grad", [False, True])
def test_short_lists_to_the_operators_themselves(requires_grad):
    """A schema's int[2] lets a list of any length through."""
    x, w = torch.ones(1, 2, 4, 4, requires_grad=requires_grad), torch.ones(2, 2, 1, 1)
    with pytest.raises(RuntimeError, match="stride"):
        torch.ops.cuda_cnn.conv2d(x, w, None, [1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match="tuple of two ints"):
        torch.ops.cuda_cnn.max_pool2d(x, [2], [2, 2], [0, 0], [1, 1], False)


def test_module_hooks_fire():
    seen = []
    layer = nn.Conv2d(4, 5, 3)
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, y: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    layer(torch.ones(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]
