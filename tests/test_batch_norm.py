"""batch_norm's values and derivatives, against float64."""

import itertools

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    ROUNDOFF,
    _report,
    assert_accurate,
    assert_bitwise,
    integers,
    lay_out,
    reals,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import _C, reference
from cuda_cnn import functional as F

# Channels around the width of a vector, 1, primes; a plane larger than a vector and one smaller; ranks 2 to 5; more
# rows than a chunk.
SHAPES = [
    (2, 7, 5, 3),
    (3, 96, 3, 5),
    (2, 37, 11, 6),
    (5, 33),
    (2, 6, 4),
    (2, 5, 2, 3, 4),
    (9, 1, 2, 2),
    (2, 3, 29, 17),
]
NO_RESULT = [(0, 4, 3, 3), (2, 0, 3, 3), (2, 3, 0, 4)]
FUSED = list(itertools.product([False, True], repeat=2))  # residual, relu
EPS = 1e-3


def arguments(shape, dtype, seed=0):
    """x, residual, weight, bias, running mean, running variance, dy."""
    x, residual, dy = (reals(*shape, dtype=dtype, seed=3 * seed + i) for i in range(3))
    weight, bias, mean, var = (reals(shape[1], dtype=dtype, seed=100 + 4 * seed + i) for i in range(4))
    return x, residual, weight, bias, mean, var.abs() + 0.5, dy


def differentiate(function, y_mask, dy, *inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy if y_mask is None else dy * y_mask)


def sizes(x, weight, bias, mean, var, dy, residual, training):
    """The sum of the absolute values of what is added up in y, dx, dweight, dbias and dresidual."""
    dims = [d for d in range(x.dim()) if d != 1]
    if training:
        var, mean = torch.var_mean(x, dims, correction=0)
    mean, scale, weight, bias = (
        t.view(-1, *[1] * (x.dim() - 2)) for t in (mean, (var + EPS).rsqrt(), weight, bias)
    )
    normalised, g = ((x - mean) * scale).abs(), dy.abs()
    # In training the mean is a sum, too, of terms about one deviation in size.
    y = (normalised + training) * weight.abs() + bias.abs() + (0 if residual is None else residual.abs())
    sums = g + g.mean(dims, keepdim=True) + normalised * (g * normalised).mean(dims, keepdim=True)
    dx = weight.abs() * scale * (sums if training else g)
    return y, dx, (g * normalised).sum(dims), g.sum(dims), g


def check_against_reference(shape, dtype, layout, training, fused, device="cpu", parameter_dtype=None):
    residual, relu = fused
    x, r, weight, bias, mean, var, dy = arguments(shape, dtype)
    weight, bias, mean, var = (t.to(parameter_dtype or dtype) for t in (weight, bias, mean, var))
    inputs = [x, weight, bias, *([r] if residual else [])]

    def ours(x, weight, bias, r=None):
        running = (None, None) if training else (mean.to(device), var.to(device))
        return F.batch_norm(x, *running, weight, bias, training, 0.1, EPS, residual=r, relu=relu)

    def exact(x, weight, bias, r=None):
        return reference.batch_norm(x, mean.double(), var.double(), weight, bias, training, EPS, r)

    laid_out = [lay_out(t.to(device), layout) if t.dim() > 1 else t.to(device) for t in inputs]
    actual = differentiate(ours, None, lay_out(dy.to(device), layout), *laid_out)
    # The exact gradient under the mask that our y shows: a rounding of y may lie across the ReLU's corner.
    mask = (actual[0] > 0).cpu() if relu else None
    expected = list(differentiate(exact, mask, dy.double(), *(t.double() for t in inputs)))
    if relu:
        expected[0] = expected[0].relu()
    doubles = (t.double() for t in (x, weight, bias, mean, var, dy))
    bounds = sizes(*doubles, r.double() if residual else None, training)
    names = ("y", "dx", "dweight", "dbias", "dresidual")
    for name, a, e, size in zip(names, actual, expected, bounds, strict=False):
        # The result's own rounding, and a few of the type that sums are taken in.
        internal = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        bound = (
            8 * internal * size + ROUNDOFF[a.dtype] * e.abs() + (2.0**-24 if dtype == torch.float16 else 0)
        )
        bad = ~((a.detach().cpu().double() - e).abs() <= bound)
        what = f"{name} of {shape}, {layout}, {training=}, {residual=}, {relu=}"
        assert not bad.any(), _report(a.detach().cpu(), e.detach(), bad, what)
    for a, like in zip(actual[1:], laid_out, strict=True):
        assert a.dtype == like.dtype


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [32, 33])
def test_large_results_match_reference(layout, isa, channels):
    """Beyond 4 MiB results are written past the caches, where they consist of whole vectors."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        check_against_reference((2, channels, 128, 132), torch.float32, layout, True, (True, True))
    finally:
        _C.set_cpu_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_matches_reference(device, dtype, layout, training):
    for shape, (residual, relu) in zip(SHAPES, itertools.cycle(FUSED)):
        check_against_reference(shape, dtype, layout, training, (residual, relu), device)
    for residual, relu in FUSED:
        check_against_reference(SHAPES[0], dtype, layout, training, (residual, relu), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_parameters_beside_16_bit_input(device, dtype, layout):
    for training in (True, False):
        check_against_reference((2, 7, 5, 3), dtype, layout, training, (True, True), device, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(4, 64, 31, 33), (2, 3, 130, 70), (70, 130, 1, 1), (3, 600, 5, 7)], ids=str
)
def test_several_chunks_groups_and_blocks(layout, shape):
    for (residual, relu), training in itertools.product(FUSED, [True, False]):
        check_against_reference(shape, torch.float32, layout, training, (residual, relu))


@given(
    shape=st.tuples(st.integers(2, 4), *(st.integers(1, n) for n in (40, 9, 9))),
    layout=st.sampled_from(LAYOUTS),
    fused=st.sampled_from(FUSED),
    training=st.booleans(),
)
def test_any_shape(shape, layout, fused, training):
    check_against_reference(shape, torch.float32, layout, training, fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_exact(device, dtype, layout):
    """With variance 3 and ε = 1 everything is a small multiple of ½: no kernel may be off by a bit."""
    x, residual, dy = (
        lay_out(integers(2, 19, 5, 3, dtype=dtype, seed=s).to(device), layout) for s in range(3)
    )
    weight, bias, mean = (integers(19, dtype=dtype, seed=s).to(device) for s in range(3, 6))
    var = torch.full_like(mean, 3)
    x.requires_grad_()
    y = F.batch_norm(x, mean, var, weight, bias, eps=1.0, residual=residual, relu=True)
    expected = reference.batch_norm(
        *(t.double() for t in (x, mean, var, weight, bias)), False, 1.0, residual.double(), True
    )
    assert_bitwise(y, expected.to(dtype), "y")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_bitwise(dx, dy * (y > 0) * weight[:, None, None] / 2, "dx")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mask_is_the_outputs(device, layout):
    """Whether recomputed from x or taken from y, the ReLU's mask is y > 0, element for element."""
    x, residual, weight, bias, *_, dy = arguments((3, 20, 13, 7), torch.float32)
    x = lay_out((x + 3000).to(device), layout)  # far from zero: the mask hangs on the last bit of the mean
    dy = lay_out(integers(*x.shape, dtype=torch.float32).to(device), layout)
    bias, residual = bias.to(device).requires_grad_(), residual.to(device).requires_grad_()
    y = F.batch_norm(x, None, None, weight.to(device), bias, True, relu=True)
    (dbias,) = torch.autograd.grad(y, bias, dy)
    assert_bitwise(dbias, (dy * (y > 0)).sum((0, 2, 3)), "dbias")
    y = F.batch_norm(x, None, None, weight.to(device), bias, True, residual=residual, relu=True)
    (dresidual,) = torch.autograd.grad(y, residual, dy)
    assert_bitwise(dresidual, dy * (y > 0), "dresidual")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 5, 30, 30), (2, 3, 100, 60), (600, 3)], ids=str)
def test_large_mean_beside_the_deviation(device, layout, shape):
    """What is left of x − mean is exact where torch's E[x²]-like sums have lost it all."""
    x = lay_out((1e4 + reals(*shape, dtype=torch.float32)).to(device), layout)
    y, mean, var = torch.ops.cuda_cnn.batch_norm(x, None, None, None, None, None, True, 0.0, False)
    dims = [d for d in range(x.dim()) if d != 1]
    exact_var, exact_mean = torch.var_mean(x.double(), dims, correction=0)
    assert ((mean - exact_mean).abs() < 1e-7 * exact_var.sqrt()).all()
    assert ((var / exact_var - 1).abs() < 2e-6).all()
    assert_accurate(y, reference.batch_norm(x.double().cpu(), None, None, training=True, eps=0.0), ulps=24)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 100, 60), (1200, 3)], ids=str)
def test_joining_parts_loses_nothing(device, layout, shape):
    """In float64, where partial sums of squares have no digits to spare: Chan, Golub and LeVeque join them."""
    x = lay_out(1e6 + reals(*shape, dtype=torch.float64), layout)
    _, mean, var = torch.ops.cuda_cnn.batch_norm(x.to(device), None, None, None, None, None, True, 0.0, False)
    dims = [d for d in range(x.dim()) if d != 1]
    exact_var, exact_mean = torch.var_mean(x - 1e6, dims, correction=0)  # the difference is exact
    assert ((mean.cpu() - 1e6 - exact_mean).abs() < 1e-9).all()
    assert ((var.cpu() / exact_var - 1).abs() < 1e-9).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlier_first_does_not_spoil_the_variance(layout):
    x = reals(2, 6, 60, 60, dtype=torch.float32)
    x[0, :, 0, 0] = 1e6
    _, _, var = torch.ops.cuda_cnn.batch_norm(
        lay_out(x, layout), None, None, None, None, None, True, 0.0, False
    )
    assert ((var / x.double().var((0, 2, 3), correction=0) - 1).abs() < 1e-5).all()


def test_strides_are_torchs(device):
    for shape, layout, training in itertools.product(SHAPES, LAYOUTS, [True, False]):
        x, _, weight, bias, mean, var, dy = (t.to(device) for t in arguments(shape, torch.float32))
        x = lay_out(x, layout).requires_grad_()
        results = []
        for batch_norm in (F.batch_norm, torch.nn.functional.batch_norm):
            y = batch_norm(x, mean.clone(), var.clone(), weight, bias, training)
            results.append((y.stride(), torch.autograd.grad(y, x, dy)[0].stride()))
        assert results[0] == results[1], (shape, layout, training)


@pytest.mark.parametrize("shape", NO_RESULT + [(0,)], ids=str)
def test_empty(device, shape):
    channels = shape[1] if len(shape) > 1 else 0
    x = torch.ones(shape, device=device, requires_grad=True)
    weight, mean, var = (torch.ones(channels, device=device) for _ in range(3))
    weight.requires_grad_()
    for training in (True, False):
        y = F.batch_norm(x, mean, var, weight, None, training)
        dx, dweight = torch.autograd.grad(y.sum(), [x, weight])
        assert y.shape == dx.shape == x.shape
        assert_bitwise(dweight, torch.zeros_like(weight))
        assert_bitwise(mean, torch.ones_like(mean), "running mean")


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.3])
def test_running_statistics(device, momentum):
    for dtype, statistics_dtype in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        x, *_ = arguments((3, 7, 4, 5), dtype)
        results = []
        for batch_norm, compute in ((F.batch_norm, dtype), (torch.nn.functional.batch_norm, torch.float64)):
            mean, var = torch.full((7,), 0.5), torch.full((7,), 2.0)
            mean, var = (t.to(device, statistics_dtype if compute == dtype else compute) for t in (mean, var))
            batch_norm(x.to(device, compute), mean, var, training=True, momentum=momentum)
            results.append((mean, var))
        for ours, exact in zip(*results, strict=True):
            assert ours.dtype == statistics_dtype
            assert_accurate(ours, exact, ulps=16)


def test_infinity_and_nan(device):
    """Eval: they stay where they are. Training: their channel alone is lost, as in torch."""
    x = reals(2, 5, 3, 4, dtype=torch.float32).to(device)
    x[0, 1, 0, 0], x[1, 3, 2, 1] = float("inf"), float("nan")
    ones, zeros = torch.ones(5, device=device), torch.zeros(5, device=device)
    for layout in ("contiguous", "channels_last"):
        t = lay_out(x, layout)
        y = F.batch_norm(t, zeros, ones, eps=0.0, relu=True)
        assert_bitwise(y, x.relu())
        mean, var = zeros.clone(), ones.clone()
        torch_mean, torch_var = zeros.clone(), ones.clone()
        y = F.batch_norm(t, mean, var, training=True)
        expected = torch.nn.functional.batch_norm(t, torch_mean, torch_var, training=True)
        assert y.isnan().equal(expected.isnan())
        assert mean.isinf().equal(torch_mean.isinf()) and mean.isnan().equal(torch_mean.isnan())
        assert var.isnan().equal(torch_var.isnan())
        dy = torch.ones_like(t)
        t.requires_grad_()
        (dx,) = torch.autograd.grad(F.batch_norm(t, zeros, ones, eps=0.0), t, dy)
        assert_bitwise(dx, dy, "dx in evaluation")
        t.requires_grad_(False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual,relu", FUSED)
@pytest.mark.parametrize("affine", [True, False])
def test_derivatives(device, training, residual, relu, affine):
    x, r, weight, bias, mean, var, _ = (t.to(device) for t in arguments((3, 2, 2, 2), torch.float64))
    running = (None, None) if training else (mean, var)
    inputs = [x, *([weight, bias] if affine else []), *([r] if residual else [])]

    def function(x, *rest):
        weight, bias = rest[:2] if affine else (None, None)
        return F.batch_norm(
            x, *running, weight, bias, training, 0.1, EPS, residual=rest[-1] if residual else None, relu=relu
        )

    inputs = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivative(training):
    x, _, weight, bias, mean, var, dy = arguments((4, 2, 3), torch.float64)
    running = (None, None) if training else (mean, var)

    def third(batch_norm):
        t = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((batch_norm(t) * dy).square().sum(), t, create_graph=True)
        (second,) = torch.autograd.grad((first * dy).square().sum(), t, create_graph=True)
        return torch.autograd.grad((second * dy).sum(), t)[0]

    ours = third(lambda t: F.batch_norm(t, *running, weight, bias, training, eps=0.1))
    expected = third(lambda t: reference.batch_norm(t, *running, weight, bias, training, eps=0.1))
    assert_accurate(ours, expected, ulps=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_second_derivative_keeps_dtypes(dtype):
    x, residual, weight, bias, *_ = arguments((3, 4, 5, 2), dtype)
    weight, bias = weight.float(), bias.float()
    inputs = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y = F.batch_norm(x, None, None, weight, bias, True, residual=residual, relu=True)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)
    for t, a, b in zip(inputs, first, second, strict=True):
        assert a.dtype == b.dtype == t.dtype and b.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2048, 7, 7), (4, 1000, 7, 7), (4, 72, 28, 28)], ids=str)
def test_gradients_do_not_depend_on_the_threads(shape, dtype):
    """Of few rows and many channels several threads have channels apart, one has all of them."""
    x, dy = (lay_out(reals(*shape, dtype=dtype, seed=seed), "channels_last") for seed in (1, 2))
    weight, bias = reals(shape[1], dtype=torch.float32, seed=3), reals(shape[1], dtype=torch.float32, seed=4)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = F.batch_norm(x, None, None, weight, bias, True, relu=True)
            results.append([y, *torch.autograd.grad(y, inputs, dy)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            assert_bitwise(ours, expected)
