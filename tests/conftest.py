"""Devices: every operator test runs on the CPU kernels, on the emulated CUDA kernels, and on a GPU if there is one.

A test asks for the fixture `device` and creates its tensors on it. "cuda_emulated" is the CUDA source run on the
CPU: its tensors are CPU tensors, and the calls are led to the emulated library.
"""

from collections.abc import Iterator

import pytest
import torch


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield torch.device(request.param)
