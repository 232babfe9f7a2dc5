import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_accurate, assert_bitwise, integers, lay_out, reals
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import functional as F
from cuda_cnn import nn, reference

SHAPES = [
    (2, 7, 5, 3),
    (1, 1, 1, 1),
    (3, 96, 9, 13),
    (2, 37, 11, 6),
    (2, 6, 4),
    (1, 5, 2, 3, 4),
    (0, 4, 3, 3),
]
ALEXNET = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
TORCH = torch.nn.functional.local_response_norm  # refuses some layouts
STRONG = {"size": 4, "alpha": 0.9, "beta": 0.6, "k": 0.5}


def with_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy.expand_as(y))
    return y, dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters", [ALEXNET, STRONG], ids=["alexnet", "strong"])
def test_matches_reference(device, dtype, layout, parameters):
    for seed, shape in enumerate(SHAPES):
        x = reals(*shape, dtype=dtype, seed=seed)
        dy = reals(*shape, dtype=dtype, seed=seed + 100)
        exact = with_gradient(
            lambda t: reference.local_response_norm(t, **parameters), x.double(), dy.double()
        )
        x, dy = lay_out(x.to(device), layout), lay_out(dy.to(device), layout)
        ours = with_gradient(lambda t: F.local_response_norm(t, **parameters), x, dy)
        torchs = (None, None)
        if dtype in (torch.float32, torch.float64):  # torch has no 16-bit average pooling on a CPU
            torchs = with_gradient(lambda t: TORCH(t, **parameters), x.contiguous(), dy)
        for name, a, e, t in zip(("y", "dx"), ours, exact, torchs, strict=True):
            assert a.dtype == dtype
            assert_accurate(a, e, t, ulps=12, what=f"{name} of {shape}, {layout}")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 40])
def test_window_edges(device, size):
    """β = 1, α = n, k = 0 in float64: one neighbour too many or too few would show at once."""
    x = 2.0 ** integers(2, 9, 3, 5, dtype=torch.float64, low=0, high=3)
    expected = reference.local_response_norm(x, size, float(size), 1.0, 0.0)
    for layout in ("contiguous", "channels_last"):
        y = F.local_response_norm(lay_out(x.to(device), layout), size, float(size), 1.0, 0.0)
        assert_accurate(y, expected, ulps=2, what=f"size {size}, {layout}")


def test_strides_are_torchs(device):
    not_empty = [shape for shape in SHAPES if shape[0]]
    for shape, layout in itertools.product(not_empty, ["contiguous", "channels_last"]):
        x = lay_out(reals(*shape, dtype=torch.float32).to(device), layout)
        assert F.local_response_norm(x, 5).stride() == torch.nn.functional.local_response_norm(x, 5).stride()


@pytest.mark.parametrize("size,beta", [(5, 0.75), (4, 0.6), (1, 0.5)])
def test_derivatives(device, size, beta):
    x = reals(2, 6, 3, 2, dtype=torch.float64).to(device).requires_grad_()

    def function(t):
        return F.local_response_norm(t, size, 0.5, beta, 1.5)

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


def test_transforms():
    x = reals(4, 5, 3, 2, dtype=torch.float64)

    def loss(t):
        return F.local_response_norm(t[None], 3, 0.3).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    assert_bitwise(per_sample, torch.stack([torch.func.grad(loss)(t) for t in x]))
    with pytest.raises(RuntimeError):  # no forward-mode formula: an error, never silent zeros
        torch.func.jvp(lambda t: F.local_response_norm(t, 3), (x,), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = lay_out(reals(2, 6, 3, 4, dtype=torch.float32), layout).requires_grad_()
    dy = torch.randn_like(x)
    torch.library.opcheck(torch.ops.cuda_cnn.local_response_norm.default, (x, 5, 0.1, 0.75, 1.0))
    torch.library.opcheck(torch.ops.cuda_cnn.local_response_norm_backward.default, (dy, x, 5, 0.1, 0.75, 1.0))


def test_compile_and_export():
    layer = nn.LocalResponseNorm(5, 1e-2)
    x = reals(2, 8, 4, 4, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x), layer(x))
    assert_bitwise(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, layer)))
    assert_bitwise(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_autocast_gives_float32_as_torch_does():
    x = reals(2, 8, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.local_response_norm(x, 5)
        assert y.dtype == torch.nn.functional.local_response_norm(x, 5).dtype == torch.float32


def test_not_a_number_stays_in_its_window(device):
    x = torch.ones(1, 9, 1, 2, device=device)
    x[0, 4, 0, 0] = float("nan")
    for layout in ("contiguous", "channels_last"):
        y = F.local_response_norm(lay_out(x, layout), 3)
        assert y.isnan()[0, :, 0, 0].tolist() == [False] * 3 + [True] * 3 + [False] * 3
        assert not y[..., 1].isnan().any()


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 6, 9))),
    size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(shape, size, layout):
    x, dy = (reals(*shape, dtype=torch.float32, seed=seed) for seed in (0, 1))
    exact = with_gradient(lambda t: reference.local_response_norm(t, size, 0.5), x.double(), dy.double())
    ours = with_gradient(lambda t: F.local_response_norm(t, size, 0.5), lay_out(x, layout), dy)
    for a, e in zip(ours, exact, strict=True):
        assert_accurate(a, e, ulps=16)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: F.local_response_norm(torch.ones(2, 3), 5), ValueError, "3 or more dimensions, got 2"),
        (lambda: F.local_response_norm(torch.ones(2, 3, 4), 0), RuntimeError, "size > 0, got 0"),
        (
            lambda: F.local_response_norm(torch.ones(2, 3, 4).int(), 5),
            RuntimeError,
            "of dtype float32.*got Int",
        ),
        (lambda: F.local_response_norm(torch.ones(2, 3, 4, 4).to_sparse(), 5), RuntimeError, "dense"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
