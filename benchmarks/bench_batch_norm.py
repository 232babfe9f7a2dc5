"""batch_norm on the layers that use it, forward and with all gradients, beside torch's."""

import pytest

from cuda_cnn.bench.shapes import layers, short_name


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("layer", layers(op="batch_norm"), ids=short_name)
def bench_batch_norm(against_torch, layer, backward):
    against_torch(layer, backward)
