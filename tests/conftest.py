"""Devices: every operator test runs on the CPU kernels, on the emulated CUDA kernels, and on a GPU if there is one.

A test asks for the fixture `device` and creates its tensors on it. "cuda_emulated" is the CUDA source run on the
CPU: its tensors are CPU tensors, and the calls are led to the emulated library.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    yield torch.device(request.param)
