"""local_response_norm on the layers that use it, each pass beside torch's."""

import pytest

from cuda_cnn.bench.shapes import layers, short_name
from cuda_cnn.bench.work import passes


@pytest.mark.parametrize("direction", passes("local_response_norm"))
@pytest.mark.parametrize("layer", layers(op="local_response_norm"), ids=short_name)
def bench_local_response_norm(against_torch, layer, direction):
    against_torch(layer, direction)
