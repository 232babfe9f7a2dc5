import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_accurate, assert_bitwise, integers, lay_out, reals
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

from cuda_cnn import _C, nn, reference
from cuda_cnn import functional as F

OP_INFO = next(op for op in op_db if op.name == "nn.functional.max_pool2d")
INFINITY, NAN = float("inf"), float("nan")

# shape, kernel_size, stride, padding, dilation, ceil_mode
CASES = [
    ((2, 3, 8, 8), 2, None, 0, 1, False),
    ((2, 64, 13, 13), 3, 2, 0, 1, False),  # AlexNet
    ((1, 70, 17, 23), 3, 2, 1, 1, False),  # ResNet
    ((2, 19, 9, 14), 3, 2, 0, 1, True),  # GoogLeNet
    ((1, 17, 7, 7), 3, 1, 1, 1, True),
    ((2, 9, 14, 14), 2, None, 0, 1, False),  # VGG
    ((3, 5, 15, 13), 3, 2, 1, 1, False),
    ((1, 3, 9, 38), 2, None, 1, 1, True),
    ((3, 1, 11, 5), (3, 2), (1, 3), (1, 0), (2, 1), False),
    ((1, 5, 40, 37), (5, 4), (3, 2), (2, 1), (3, 5), True),
    ((2, 2, 20, 21), (2, 1), (7, 3), 0, 1, False),  # cells that no window holds
    ((1, 3, 19, 18), 17, 1, 8, 1, False),  # more than 255 cells a window
    ((1, 2, 300, 130), 3, 2, 1, 1, False),  # several bands of one plane
    ((1, 1, 1, 1), 1, None, 0, 1, False),
    ((5, 12, 10), 3, 2, 1, 1, False),  # unbatched
    ((0, 3, 6, 6), 2, None, 0, 1, False),
]


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def one_thread():
    """For many tiny calls: threads that spin between them would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pooled(function, x, dy, *window):
    """(y, indices, dx)."""
    x = x.detach().requires_grad_()
    y, indices = function(x, *window, return_indices=True)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, indices, dx


def torch_pooled(x, *window):
    return torch.nn.functional.max_pool2d(x, *window)


def assert_as_torch(x, window, layout, device="cpu"):
    """Values, indices, gradient and all their strides, for a whole-numbered gradient."""
    y = torch_pooled(x, *window)
    dy = integers(*y.shape, dtype=x.dtype, seed=1)
    x, dy = lay_out(x.to(device), layout), lay_out(dy.to(device), layout)
    expected = pooled(torch.nn.functional.max_pool2d, x, dy, *window)
    ours = pooled(F.max_pool2d, x, dy, *window)
    for name, a, e in zip(("y", "indices", "dx"), ours, expected, strict=True):
        assert_bitwise(a, e, f"{name} of {tuple(x.shape)}, {window}, {layout}")
        assert a.stride() == e.stride(), f"{name} of {tuple(x.shape)}, {window}, {layout}"
    assert_bitwise(F.max_pool2d(x, *window), expected[0], f"without indices, {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_torch(device, dtype, layout):
    for seed, (shape, *window) in enumerate(CASES):
        assert_as_torch(integers(*shape, dtype=dtype, low=-9, high=9, seed=seed), window, layout, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set(isa, dtype, layout):
    for seed, (shape, *window) in enumerate(CASES):
        x = integers(*shape, dtype=dtype, low=-9, high=9, seed=seed)
        x.view(-1)[::7] = NAN
        assert_as_torch(x, window, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(device, layout):
    for seed, (shape, *window) in enumerate(CASES):
        x = reals(*shape, dtype=torch.float64, seed=seed)
        dy = reals(*torch_pooled(x, *window).shape, dtype=torch.float64, seed=seed + 100)
        exact = x.clone().requires_grad_()
        expected = reference.max_pool2d(exact, *window)
        (expected_dx,) = torch.autograd.grad(expected, exact, dy)
        y, _, dx = pooled(F.max_pool2d, lay_out(x.to(device), layout), dy.to(device), *window)
        assert_bitwise(y, expected, f"y of {shape}, {layout}")
        assert_accurate(dx, expected_dx, what=f"dx of {shape}, {layout}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [-INFINITY],
        [-INFINITY, -INFINITY, NAN],
        [0.0, NAN, 1.0, NAN],
        [INFINITY, NAN, -INFINITY],
        [0.0, -0.0],
    ],
    ids=["ties", "lowest", "lowest and NaN", "NaN", "infinities", "zeros"],
)
def test_which_of_equal_cells(device, layout, values):
    for window in [(3, 2, 1, 1, False), (2, 1, 0, 1, False), ((3, 2), 2, (1, 0), (2, 3), True)]:
        x = torch.tensor(values).repeat(2 * 19 * 15 * 18)[: 2 * 19 * 15 * 18].view(2, 19, 15, 18)
        assert_as_torch(x, window, layout, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_window_without_a_cell_inside(layout):
    """Taps at −1 and 1 of a plane one cell wide: −inf, and a gradient that goes nowhere."""
    x = lay_out(torch.ones(2, 3, 4, 1), layout).requires_grad_()
    y = F.max_pool2d(x, 2, 1, (0, 1), (1, 2))
    assert torch.equal(y, torch.full((2, 3, 3, 1), -INFINITY))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_bitwise(dx, torch.zeros_like(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_threads(layout):
    x = lay_out(reals(3, 37, 57, 41, dtype=torch.float32), layout)
    dy = reals(3, 37, 28, 20, dtype=torch.float32, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pooled(F.max_pool2d, x, dy, 3, 2))
    finally:
        torch.set_num_threads(before)
    for other, (a, e) in itertools.product(results[1:], enumerate(results[0])):
        assert_bitwise(other[a], e)


def test_backward_keeps_one_byte_a_window():
    kept = []
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        F.max_pool2d(x, 3, 2)
    assert kept == [2 * 3 * 5 * 5]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 2)])
def test_derivatives(device, layout, window):
    x = lay_out(torch.randperm(2 * 3 * 7 * 6).double().view(2, 3, 7, 6).to(device), layout).requires_grad_()

    def function(t):
        return F.max_pool2d(t.square(), *window)  # max-pooling alone has no second derivative

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)

    def gradient(t):
        return torch.autograd.grad(function(t).sum(), t, create_graph=True)[0].square()

    assert gradgradcheck(gradient, x)


def test_transforms():
    x = reals(4, 3, 8, 7, dtype=torch.float64)

    def loss(t):
        return F.max_pool2d(t, 3, 2, 1).square().sum()

    for batch in (x, x[:, None]):  # unbatched samples, batches of one
        per_sample = torch.func.vmap(torch.func.grad(loss))(batch)
        assert_bitwise(per_sample, torch.stack([torch.func.grad(loss)(t) for t in batch]))
        y, indices = torch.func.vmap(
            lambda t: F.max_pool2d(t, 3, 2, 1, return_indices=True), in_dims=2, out_dims=1
        )(batch.movedim(0, 2))
        expected = [torch.nn.functional.max_pool2d(t, 3, 2, 1, return_indices=True) for t in batch]
        assert_bitwise(y, torch.stack([e[0] for e in expected], 1))
        assert_bitwise(indices, torch.stack([e[1] for e in expected], 1))
    hessian = torch.func.jacrev(torch.func.grad(loss))
    assert_bitwise(
        hessian(x[0]),
        torch.func.jacrev(torch.func.grad(lambda t: torch_pooled(t, 3, 2, 1).square().sum()))(x[0]),
    )
    with pytest.raises(RuntimeError):  # no forward-mode formula: an error, never silent zeros
        torch.func.jvp(lambda t: F.max_pool2d(t, 3), (x,), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    ops = torch.ops.cuda_cnn
    window = [3, 2], [2, 1], [1, 0], [1, 2]
    x = lay_out(reals(2, 6, 9, 8, dtype=torch.float32), layout).requires_grad_()
    y, taps = ops.max_pool2d_with_taps(x.detach(), *window, True)
    dy = torch.randn_like(y).requires_grad_()
    for op in (ops.max_pool2d, ops.max_pool2d_with_taps, ops.max_pool2d_with_indices):
        torch.library.opcheck(op.default, (x, *window, True))
    torch.library.opcheck(ops.max_pool2d_backward.default, (dy, taps, [9, 8], *window))
    torch.library.opcheck(ops.max_pool2d_gather.default, (x, taps, *window))


def test_gradient_of_the_traced_operator():
    """An exported graph holds the operator without taps; a gradient through it is right all the same."""
    x = reals(2, 3, 9, 9, dtype=torch.float64).requires_grad_()
    y = torch.ops.cuda_cnn.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    (expected,) = torch.autograd.grad(torch_pooled(x, 3, 2, 1).square().sum(), x)
    assert_bitwise(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("return_indices", [False, True])
def test_compile_and_export(return_indices):
    layer = nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=return_indices)
    x = reals(2, 8, 9, 12, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module()

    def values(f):
        return f(x) if return_indices else (f(x),)

    for f in (compiled, exported):
        for a, e in zip(values(f), values(layer), strict=True):
            assert_bitwise(a, e)
    assert_bitwise(*(torch.autograd.grad(values(f)[0].square().sum(), x)[0] for f in (compiled, layer)))
    with torch.no_grad():
        assert_bitwise(values(compiled)[0], values(layer)[0])


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        lambda t: F.max_pool2d(t, 3, 2, 1), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in [(2, 3, 9, 8), (3, 3, 12, 17), (1, 5, 7, 7)]:
        x = reals(*shape, dtype=torch.float32).requires_grad_()
        assert_bitwise(compiled(x), torch_pooled(x, 3, 2, 1))
        assert_bitwise(
            *(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda t: torch_pooled(t, 3, 2, 1)))
        )


def test_autocast_keeps_the_dtype_as_torch_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = reals(2, 8, 4, 4, dtype=dtype)
            assert F.max_pool2d(x, 2).dtype == torch_pooled(x, 2).dtype == dtype


def test_expanded_input(device):
    x = reals(1, 3, 6, 1, dtype=torch.float32).to(device).expand(4, 3, 6, 5)
    assert_bitwise(F.max_pool2d(x, 2), torch_pooled(x, 2))


def test_layer():
    layer = nn.MaxPool2d(3, 2, 1)
    assert isinstance(layer, torch.nn.MaxPool2d) and not layer.state_dict()
    x = reals(2, 3, 9, 9, dtype=torch.float32)
    assert_bitwise(layer(x), torch.nn.MaxPool2d(3, 2, 1)(x))


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 20, 30))),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    half=st.tuples(st.booleans(), st.booleans()),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, kernel, stride, half, dilation, ceil_mode, layout, dtype):
    padding = tuple(k // 2 if h else 0 for k, h in zip(kernel, half, strict=True))
    window = kernel, stride, padding, dilation, ceil_mode
    x = integers(*shape, dtype=dtype, low=-9, high=9)
    try:
        y = torch_pooled(x, *window)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            F.max_pool2d(x, *window)
        return
    if not y.isinf().any():  # torch sends the gradient of a window without a cell inside to a stranger
        assert_as_torch(x, window, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opinfo_samples(dtype, one_thread):
    for sample in OP_INFO.sample_inputs("cpu", dtype, requires_grad=True):
        what = f"{tuple(sample.input.shape)}, {sample.args}, {sample.kwargs}"
        results = []
        for function in (F.max_pool2d, OP_INFO.op):
            result = function(sample.input, *sample.args, **sample.kwargs)
            y, *indices = result if isinstance(result, tuple) else (result,)
            (dx,) = torch.autograd.grad(y.sum(), sample.input)
            results.append([y, dx, *indices])
        for a, e in zip(*results, strict=True):
            assert_bitwise(a, e, what)
            assert a.stride() == e.stride(), what


def test_opinfo_errors():
    for error in OP_INFO.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            F.max_pool2d(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: F.max_pool2d(torch.ones(4, 4), 2), RuntimeError, "3 or 4 dimensions, got 2"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 1, 4, 4), 2), RuntimeError, "3 or 4 dimensions, got 5"),
        (
            lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 0),
            RuntimeError,
            "kernel size should be greater than zero, got 0",
        ),
        (
            lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, 0),
            RuntimeError,
            "stride should be greater than zero, got 0",
        ),
        (
            lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, -1),
            RuntimeError,
            "stride should be greater than zero",
        ),
        (
            lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, 2, 0, 0),
            RuntimeError,
            "dilation should be greater than zero",
        ),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, 2, 2), RuntimeError, "at most half"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 3, 1, 2, 2), RuntimeError, "half of kernel size"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 5), RuntimeError, "Output size is too small"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2**62), RuntimeError, "kernel size"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, 2**62), RuntimeError, "stride"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), (2, 2, 2)), RuntimeError, "tuple of two ints"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2.0), TypeError, "kernel_size to be an int"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4).int(), 2), RuntimeError, "of dtype float32.*got Int"),
        (lambda: F.max_pool2d(torch.ones(1, 1, 4, 4).to_sparse(), 2), RuntimeError, "dense"),
        (lambda: nn.MaxPool2d(2)(torch.ones(4)), RuntimeError, "got 1"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
