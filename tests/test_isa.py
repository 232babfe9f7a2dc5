"""Every instruction set over operators, element types and layouts: exact on whole numbers, and as near to the exact
result as the baseline on real ones."""

from collections.abc import Iterator

import pytest
import torch
from helpers import DTYPES, LAYOUTS, ROUNDOFF, assert_bitwise, integers, lay_out, reals

from cuda_cnn import _C
from cuda_cnn import functional as F

# One more channel than two of the widest vectors; a plane that no vector divides.
SHAPE = (2, 33, 7, 9)


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


OPERATORS = {
    "conv2d": lambda x, w, v: F.conv2d(x, w, v[:5], padding=1),
    "conv2d strided": lambda x, w, v: F.conv2d(x, w, stride=2),
    "max_pool2d": lambda x, w, v: F.max_pool2d(x, 3, 2, 1),
    "local_response_norm": lambda x, w, v: F.local_response_norm(x, 5, 0.5),
    "batch_norm": lambda x, w, v: F.batch_norm(x, None, None, v, v, training=True),
    "batch_norm fused": lambda x, w, v: F.batch_norm(x, v, v.abs(), v, v, eps=1.0, residual=x, relu=True),
    "subsample": lambda x, w, v: F.subsample(x, v, v, squash="none"),
    "subsample tanh": lambda x, w, v: F.subsample(x, v, v),
    "concat": lambda x, w, v: F.concat([x, x[:, 1:], x[:, :2]], 1),
}
EXACT = ["conv2d", "conv2d strided", "max_pool2d", "subsample", "concat"]


def differentiate(name, x, w, v):
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, v)]
    y = OPERATORS[name](*inputs)
    dy = integers(*y.shape, dtype=y.dtype, low=-1, high=2, seed=9)
    grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_whole_numbers_are_exact(isa, name, dtype):
    """Every partial sum is below 2⁸ or 2¹¹ for x and y; parameters' gradients are compared where dtype holds them."""
    x, w = (integers(*s, dtype=dtype, low=-1, high=2) for s in (SHAPE, (5, 33, 3, 3)))
    v = 4 * integers(33, dtype=dtype, low=-1, high=2)
    exact = differentiate(name, x.double(), w.double(), v.double())
    for layout in LAYOUTS:
        for ours, expected in zip(differentiate(name, lay_out(x, layout), w, v), exact, strict=True):
            assert_bitwise(ours, expected.to(dtype), f"{name} with {isa}, {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_real_numbers_are_as_near_as_the_baseline(isa, name, dtype):
    x, w, v = (reals(*s, dtype=dtype, seed=i) for i, s in enumerate([SHAPE, (5, 33, 3, 3), (33,)]))
    exact = differentiate(name, x.double(), w.double(), v.double())
    for layout in ("contiguous", "channels_last"):
        laid_out = lay_out(x, layout)
        ours = differentiate(name, laid_out, w, v)
        _C.set_cpu_isa("baseline")
        baseline = differentiate(name, laid_out, w, v)
        _C.set_cpu_isa(isa)
        for a, b, e in zip(ours, baseline, exact, strict=True):
            size = e.abs().max()
            error, allowed = ((t.double() - e).abs().max() / size for t in (a, b))
            assert error <= 2 * allowed + 4 * ROUNDOFF[dtype], f"{name} with {isa}, {layout}"
            assert a.stride() == b.stride()
