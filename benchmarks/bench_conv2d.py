"""conv2d on the layers that use it, each pass beside torch's."""

import pytest

from cuda_cnn.bench.shapes import layers, short_name
from cuda_cnn.bench.work import passes


@pytest.mark.parametrize("direction", passes("conv2d"))
@pytest.mark.parametrize("layer", layers(op="conv2d"), ids=short_name)
def bench_conv2d(against_torch, layer, direction):
    against_torch(layer, direction)
