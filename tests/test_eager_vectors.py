"""A normalisation's vectors in one loop each (csrc/eager_vectors.cpp): the numbers and derivatives of torch's
operators, and NotImplemented where somebody else must see the call."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import _C

EPS = 1e-3


def values(dtype, *kinds):
    generator = torch.Generator().manual_seed(0)
    mean, weight, bias = (torch.randn(37, dtype=dtype, generator=generator) for _ in range(3))
    var = torch.rand(37, dtype=dtype, generator=generator) + 0.1
    return mean, var, weight if "weight" in kinds else None, bias if "bias" in kinds else None


def composed(mean, var, weight, bias):
    scale = (var + EPS).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kinds", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_vectors(dtype, kinds):
    given = values(dtype, *kinds)
    leaves = [t.requires_grad_() for t in given if t is not None]
    grads = torch.randn(2, 37, dtype=dtype, generator=torch.Generator().manual_seed(1)).unbind()
    found = _C.eager.vectors(*given, EPS)
    expected = composed(*given)
    torch.testing.assert_close(found, expected)
    for used in ((0,), (1,), (0, 1)):  # a vector that nobody reads has no gradient
        of = [
            torch.autograd.grad(
                [o[i] for i in used], leaves, [grads[i] for i in used], True, allow_unused=True
            )
            for o in (found, expected)
        ]
        for actual, right in zip(*of, strict=True):
            torch.testing.assert_close(
                torch.zeros(37, dtype=dtype) if actual is None else actual,
                torch.zeros(37, dtype=dtype) if right is None else right,
            )


def test_derivatives_of_vectors():
    leaves = [t.requires_grad_() for t in values(torch.float64, "weight", "bias")]
    assert gradcheck(lambda *t: _C.eager.vectors(*t, EPS), leaves)
    assert gradgradcheck(lambda *t: _C.eager.vectors(*t, EPS), leaves)


def test_vectors_that_are_left_to_torch():
    mean, var, weight, bias = values(torch.float32, "weight", "bias")
    vectors = _C.eager.vectors
    assert vectors(mean, var, weight.bfloat16(), bias, EPS) is NotImplemented
    assert vectors(mean.to("meta"), var, weight, bias, EPS) is NotImplemented
    assert vectors(mean, var[:5], weight, bias, EPS) is NotImplemented
    assert torch.func.vmap(lambda m: m + (vectors(m, var, weight, bias, EPS) is NotImplemented))(
        mean[None]
    ).equal(mean[None] + 1)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert vectors(mean, var, weight, bias, EPS) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_follow(dtype):
    mean, var, batch_mean, batch_var = (t.double() for t in values(torch.float32, "weight", "bias"))
    running, batches = [mean.to(dtype), var.to(dtype)], torch.tensor(4)
    versions = [t._version for t in running]
    expected = [
        r.clone().mul_(0.9).add_(v, alpha=0.1 * u)
        for r, v, u in zip(running, (batch_mean, batch_var), (1, 1.25))
    ]
    assert _C.eager.follow_batch(*running, batches, batch_mean, batch_var, 0.1, 1.25) is True
    near = {"rtol": 0.016, "atol": 4e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(running, expected, **near)
    assert batches == 5 and all(t._version > v for t, v in zip(running, versions))
    assert _C.eager.follow_batch(None, None, None, mean, var, 0.1, 1.25) is NotImplemented
    assert _C.eager.follow_batch(*running, batches, mean, var, None, 1.25) is NotImplemented and batches == 5
