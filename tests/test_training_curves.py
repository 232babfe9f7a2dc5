"""Small networks in training: 20 steps in float32 and bfloat16 autocast beside torch's layers, over seeds."""

import pytest
import torch
from helpers import reals
from test_fuse import build
from training_helpers import assert_trains_like_torch

import cuda_cnn
from cuda_cnn import backends
from cuda_cnn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_training(precision):
    runs = []
    for seed in range(2):
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        for name in ("bottlenecks", "dense", "inception"):
            model = build(name, seed, torch.float32)
            cuda_cnn.revert(model)
            runs.append((model, x, torch.arange(8) % 5))
    assert_trains_like_torch(runs, precision)


def with_gradients(function, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


CALLS = {
    "3×3": (lambda x, w: F.conv2d(x, w, padding=1), (4, 32, 12, 12), (32, 32, 3, 3)),
    "1×1 of stride 2": (lambda x, w: F.conv2d(x, w, stride=2), (4, 32, 12, 12), (64, 32, 1, 1)),
    "5×5": (lambda x, w: F.conv2d(x, w, padding=2), (4, 16, 12, 12), (24, 16, 5, 5)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=16), (4, 16, 12, 12), (16, 1, 3, 3)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (4, 32, 12, 12), (32,), (32,)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_is_rounded_once(name, layout):
    """Results and gradients are as far from float64 as the exact values are when rounded to bfloat16: all sums, and
    all between the passes of one operator, are in float32. (Winograd's algorithm also rounds between its steps.)"""
    function, *shapes = CALLS[name]
    tensors = [reals(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    dy = reals(*function(*tensors).shape, dtype=torch.bfloat16, seed=9)
    exact = with_gradients(function, [t.double() for t in tensors], dy)
    with backends.flags(winograd=False):
        ours = with_gradients(function, tensors, dy)
    for actual, right in zip(ours, exact, strict=True):
        assert actual.dtype == torch.bfloat16
        once = (right.bfloat16().double() - right).norm()
        assert (actual.double() - right).norm() <= 1.05 * once
