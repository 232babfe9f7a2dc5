"""What only a GPU can show: graph capture, streams, devices, tensors past 2^31 elements, memory that runs out."""

import contextlib
import functools
import subprocess
import sys

import pytest
import torch
from helpers import assert_bitwise, integers
from torch import Tensor

from cuda_cnn import _C, reference
from cuda_cnn import functional as F

pytestmark = pytest.mark.skipif(
    not (_C.with_cuda and torch.cuda.is_available()), reason="needs a GPU and a build with CUDA"
)
CUDA = torch.device("cuda")
CHANNELS_LAST = torch.channels_last

# Each operator as a function of one NHWC tensor of 64 channels; whole numbers stay exact where the operator can.
OPERATORS = {
    "conv2d": lambda x: F.conv2d(x, weight(x, 32, 64, 3), padding=1),
    "conv2d of a stem": lambda x: F.conv2d(x[:, :3], weight(x, 16, 3, 7), stride=2, padding=3),
    "conv2d of groups": lambda x: F.conv2d(x, weight(x, 64, 16, 3), padding=1, groups=4),
    "conv2d depthwise": lambda x: F.conv2d(x, weight(x, 64, 1, 3), padding=1, groups=64),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "local_response_norm": lambda x: F.local_response_norm(x, 5, 1e-2, 0.75, 2.0),
    "batch_norm": lambda x: F.batch_norm(x, None, None, vector(x), vector(x), True),
    "batch_norm evaluating": lambda x: F.batch_norm(x, vector(x), vector(x).abs() + 1, vector(x), vector(x)),
    "concat": lambda x: F.concat([x, x[:, :8]], 1),
    "subsample": lambda x: F.subsample(x, vector(x), vector(x)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


# Made once: a copy from the host waits for the device, and may not be captured.
@functools.cache
def constant(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if len(shape) == 1:
        return (torch.arange(shape[0], dtype=torch.float32) % 5 - 2).to(device, dtype)
    values = integers(*shape, dtype=dtype, low=-1, high=2, seed=shape[0])
    return values.to(device, memory_format=CHANNELS_LAST)


def weight(x: Tensor, k: int, c: int, r: int) -> Tensor:
    return constant((k, c, r, r), x.dtype, x.device)


def vector(x: Tensor) -> Tensor:
    return constant((64,), x.dtype, x.device)


def image(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device = CUDA
) -> Tensor:
    return integers(*shape, dtype=dtype, low=-2, high=3, seed=seed).to(device, memory_format=CHANNELS_LAST)


def passes(name: str, x: Tensor) -> list[Tensor]:
    """The result and the gradient of x."""
    leaf = x.detach().requires_grad_()
    y = OPERATORS[name](leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))]


# ---- graphs --------------------------------------------------------------------------------------------------


@every_operator
def test_graph_replay_gives_the_same_bits(name):
    x, other = image(4, 64, 15, 13), image(4, 64, 15, 13, seed=1)
    expected = [t.clone() for t in passes(name, other)]
    passes(name, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = passes(name, x)
    x.copy_(other)
    graph.replay()
    for actual, e in zip(results, expected, strict=True):
        assert torch.equal(actual, e)


FIRST_CALL = """
import torch
from cuda_cnn import functional as F

x = torch.randn(4, 64, 15, 13, device="cuda").to(memory_format=torch.channels_last)
w = torch.randn(32, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)
ones = torch.ones(64, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = F.conv2d(x, w, ones[:32], padding=1)
    y = F.max_pool2d(y, 2)
    y = F.local_response_norm(y, 5)
    y = F.batch_norm(y, None, None, ones[:32], ones[:32], True)
    y = F.subsample(F.concat([y, y], 1), ones, ones)
graph.replay()
torch.cuda.synchronize()
assert y.isfinite().all() and y.any()
"""


def test_first_call_of_a_process_may_be_captured():
    result = subprocess.run([sys.executable, "-P", "-c", FIRST_CALL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


# ---- streams -------------------------------------------------------------------------------------------------


@every_operator
def test_runs_on_the_current_stream(name):
    """The input is written on that stream after a long wait: work on any other would read the old one."""
    new = image(4, 64, 15, 13, seed=1)
    expected = passes(name, new)
    x = torch.zeros_like(new)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(new)
        actual = passes(name, x)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@every_operator
def test_two_streams_at_once(name):
    inputs = [image(8, 64, 31, 29, seed=seed) for seed in range(2)]
    expected = [passes(name, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i] = passes(name, inputs[i])
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert all(torch.equal(*both) for both in zip(a, e, strict=True))


@every_operator
def test_does_not_wait_for_the_device(name):
    x = image(4, 64, 15, 13)
    passes(name, x)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.Event()
    asleep.record()
    passes(name, x)
    assert not asleep.query()
    torch.cuda.synchronize()


# ---- devices -------------------------------------------------------------------------------------------------


@every_operator
def test_other_than_the_current_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = image(4, 64, 15, 13)
    with torch.cuda.device(0):
        actual = passes(name, x.to("cuda:1"))
        assert all(t.device.index == 1 for t in actual)
        for a, e in zip(actual, passes(name, x), strict=True):
            assert torch.equal(a.cpu(), e.cpu())


# ---- large tensors -------------------------------------------------------------------------------------------

PIXELS = 128
IMAGES = 2**31 // (64 * PIXELS**2) + 2  # of 2^20 elements: 2^31 + 2^21 in all


@contextlib.contextmanager
def much_memory(gib: float):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory")
    yield
    torch.cuda.empty_cache()


def repeated(one: Tensor, layout: str) -> Tensor:
    """IMAGES times the image, dense in the layout."""
    format = CHANNELS_LAST if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((IMAGES, *one.shape[1:]), dtype=one.dtype, device=CUDA, memory_format=format)
    return x.copy_(one.expand_as(x))


def assert_repeats(y: Tensor, one: Tensor, what: str) -> None:
    """Every image of y is the image `one`."""
    for first in range(0, len(y), 64):
        same = (y[first : first + 64] == one).flatten(1).all(1)
        assert same.all(), f"{what}: image {first + int(same.logical_not().nonzero()[0])} of {len(y)}"


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "batch_norm"])
def test_past_two_to_the_31_elements(name, layout):
    """Forward and input gradient of the same image over and over; both work image by image."""
    with much_memory(40):
        one = image(1, 64, PIXELS, PIXELS, dtype=torch.bfloat16)
        one = one if layout == "channels_last" else one.contiguous()
        x = repeated(one, layout)
        expected = passes(name, one)
        for what, actual, e in zip(("y", "dx"), passes(name, x), expected, strict=True):
            assert_repeats(actual, e, f"{what} of {name}")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_batch_norm_past_two_to_the_31_elements(layout):
    """Statistics of the same image over and over are those of the image."""
    with much_memory(40):
        one = image(1, 64, PIXELS, PIXELS, dtype=torch.bfloat16)
        x = repeated(one, layout)
        y = F.batch_norm(x, None, None, None, None, True)
        exact = reference.batch_norm(one.double(), None, None, None, None, True)
        for first in range(0, IMAGES, 64):
            assert (y[first : first + 64].double() - exact).abs().max() < 2**-7


def test_weight_gradient_past_two_to_the_31_elements():
    with much_memory(40):
        one, grad = (image(1, 64, PIXELS, PIXELS, dtype=torch.bfloat16, seed=seed) for seed in range(2))
        x, dy = (
            repeated(torch.zeros_like(one), "channels_last"),
            repeated(torch.zeros_like(one), "channels_last"),
        )
        x[-1:], dy[-1:] = one, grad
        arguments = ([64, 64, 3, 3], [1, 1], [1, 1], [1, 1], 1, True)
        expected = torch.ops.cuda_cnn.conv2d_weight_grad(dy[-1:], x[-1:], *arguments)
        assert expected.any()
        assert_bitwise(torch.ops.cuda_cnn.conv2d_weight_grad(dy, x, *arguments), expected, "dweight")
        bias = torch.ops.cuda_cnn.conv2d_bias_grad(dy)
        assert_bitwise(bias, torch.ops.cuda_cnn.conv2d_bias_grad(dy[-1:]), "dbias")


def test_more_pixels_than_32_bits_number():
    """One plane of 2^31 and more pixels: left to the direct kernel, and pooling's 64-bit form."""
    with much_memory(40):
        x = torch.zeros((1, 1, 2**16 + 2, 2**15), dtype=torch.bfloat16, device=CUDA)
        x[0, 0, -2:, -2:] = torch.tensor([[1, 2], [3, 4]])
        one = torch.ones(1, 1, 2, 2, dtype=x.dtype, device=CUDA)
        assert F.conv2d(x, one)[0, 0, -1, -1] == 10
        assert F.max_pool2d(x, 2, 1)[0, 0, -1, -1] == 4


# ---- memory --------------------------------------------------------------------------------------------------


def test_out_of_memory_is_an_error_that_passes():
    x, w = torch.ones(1, 8, 1024, 1024, device=CUDA), torch.ones(4096, 8, 1, 1, device=CUDA)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            F.conv2d(x, w)
        small = image(1, 64, 9, 9)
        for name in OPERATORS:
            passes(name, small)
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
