"""Small networks in training: 20 steps in float32 and bfloat16 autocast beside torch's layers, over seeds."""

import pytest
import torch
from test_fuse import build
from training_helpers import assert_trains_like_torch

import cuda_cnn

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
