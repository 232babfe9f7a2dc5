"""Devices: an operator's tests run on CPU kernels, on emulated CUDA kernels, and on a GPU if there is one.

A test asks for the fixture `device` and creates its tensors on it. "cuda_emulated" is the CUDA source run
on the CPU: its tensors are CPU tensors, and calls are led to the emulated library with all its checks.
"""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from emulation import Unavailable, emulated, emulated_operators
from hypothesis import HealthCheck, settings

# A busy machine or a sanitizer is no reason to fail; CI takes the same examples every time.
settings.register_profile(
    "cuda_cnn", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("cuda_cnn")

# float32 means float32, unless a test asks for TF32 by this switch.
torch.backends.cudnn.allow_tf32 = False

DEVICES = ["cpu", "cuda_emulated", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param != "cuda_emulated":
        yield torch.device(request.param)
        return
    operator = request.module.__name__.removeprefix("test_")
    if operator not in emulated_operators():
        pytest.skip(f"{operator} has no CUDA kernel")
    try:
        # Another order of the threads for every test, the same one in every run.
        with emulated(seed=zlib.crc32(request.node.nodeid.encode()) % 1000, races=True, bounds=True):
            yield torch.device("cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Maps of a few pixels: waiting for a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
