"""subsample on the layers that use it, each pass beside torch's."""

import pytest

from cuda_cnn.bench.shapes import layers, short_name
from cuda_cnn.bench.work import passes


@pytest.mark.parametrize("direction", passes("subsample"))
@pytest.mark.parametrize("layer", layers(op="subsample"), ids=short_name)
def bench_subsample(against_torch, layer, direction):
    against_torch(layer, direction)
