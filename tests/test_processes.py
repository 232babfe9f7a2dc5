"""Same bits from run to run, for any number of threads, in forked children and DataLoader workers; no write beside
the output."""

import itertools
import os
import signal
import time

import pytest
import torch
from helpers import reals

from cuda_cnn import functional as F


def inputs():
    x = reals(3, 24, 29, 31, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    return x, reals(40, 24, 3, 3, dtype=torch.float32, seed=1), reals(24, dtype=torch.float32, seed=2)


OPERATORS = {
    "conv2d": lambda x, w, v: F.conv2d(x, w, None, padding=1),
    "conv2d strided": lambda x, w, v: F.conv2d(x, w, None, stride=2),
    "conv2d grouped": lambda x, w, v: F.conv2d(x, w[:, :12], None, groups=2),
    "conv2d depthwise": lambda x, w, v: F.conv2d(x, w[:24, :1], v, groups=24),
    "max_pool2d": lambda x, w, v: F.max_pool2d(x, 3, 2),
    "local_response_norm": lambda x, w, v: F.local_response_norm(x, 5),
    "batch_norm": lambda x, w, v: F.batch_norm(x, None, None, v, v, training=True, relu=True, residual=x),
    "concat": lambda x, w, v: F.concat([x, x[:, 3:], x * v[None, :, None, None]], 1),
    "subsample": lambda x, w, v: F.subsample(x, v, v),
}


def everything(name):
    """The operator's result and every gradient, as one vector of bytes."""
    tensors = [t.requires_grad_() for t in inputs()]
    y = OPERATORS[name](*tensors)
    dy = reals(*y.shape, dtype=y.dtype, seed=3)
    grads = torch.autograd.grad(y, tensors, dy, allow_unused=True)
    return torch.cat([t.detach().flatten() for t in (y, *grads) if t is not None]).view(torch.uint8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_for_any_number_of_threads(name, layout, threads, monkeypatch):
    if layout == "contiguous":
        given = tuple(t.contiguous() for t in inputs())
        monkeypatch.setitem(globals(), "inputs", lambda: tuple(t.clone() for t in given))
    threads(1)
    expected = everything(name)
    for count, _ in itertools.product((1, 2, 3, 5), range(2)):
        threads(count)
        assert torch.equal(everything(name), expected), f"{name}, {count} threads"


def cpu_times():
    """Seconds of processor time of each of this process's threads."""
    tids = map(int, os.listdir("/proc/self/task"))
    return {tid: time.clock_gettime(~tid << 3 | 6) for tid in tids}  # Linux: the clock of thread tid


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list threads")
@pytest.mark.parametrize("name", OPERATORS)
def test_two_threads_share_the_work(name, threads):
    """Work is cut before it is begun, so however busy the machine is, either thread has about half of it."""
    x, w, v = (t.requires_grad_() for t in inputs())
    x = x.detach().repeat(8, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    threads(2)
    OPERATORS[name](x, w, v)
    time.sleep(0.1)  # the second thread has stopped spinning
    before = cpu_times()
    for _ in range(5):
        OPERATORS[name](x, w, v)
    *_, second, first = sorted(after - before.get(tid, 0) for tid, after in cpu_times().items())
    assert second > first / 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["conv2d", "batch_norm"])
def test_works_in_a_forked_child(name, threads):
    """The child has none of its parent's pool: waiting for those threads would hang."""
    threads(2)
    expected = everything(name)
    tensors = inputs()  # torch's own operators are not to run in the child: they would wait
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            y = OPERATORS[name](*tensors)
            os.write(write, y[0, :, 5, 7].numpy().tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    assert found == OPERATORS[name](*tensors)[0, :, 5, 7].numpy().tobytes()
    assert torch.equal(everything(name), expected)


class Convolved(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        x, w, _ = inputs()
        return torch.get_num_threads(), F.conv2d(x + index, w)


def test_works_in_data_loader_workers():
    loader = torch.utils.data.DataLoader(
        Convolved(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for index, (count, y) in enumerate(loader):
        x, w, _ = inputs()
        assert count == 1  # what the workers are told, and the kernels ask the same pool
        assert torch.equal(y, F.conv2d(x + index, w))


GUARD = 77


@pytest.mark.parametrize("channels", [1, 3, 7, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_neighbours_of_a_slice_are_not_touched(channels, dtype):
    """Whatever lies around an input is neither read (it is NaN) nor written."""
    wide = torch.full((2, channels + 2, 9, 11), float("nan"), dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    x = wide[:, 1:-1]
    x.copy_(reals(2, channels, 9, 11, dtype=dtype))
    weight = reals(5, channels, 3, 3, dtype=dtype, seed=1)
    ones = torch.ones(channels, dtype=dtype)
    for y in (
        F.conv2d(x, weight, padding=1),
        F.max_pool2d(x, 3, 2, 1),
        F.local_response_norm(x, 5),
        F.batch_norm(x, None, None, ones, ones, training=True),
        F.subsample(x, ones, ones),
        F.concat([x, x]),
    ):
        assert not y.isnan().any()
    assert wide[:, 0].isnan().all() and wide[:, -1].isnan().all()


def test_guards_around_a_written_slice():
    buffer = torch.full((2, 12, 5, 7), float(GUARD)).contiguous(memory_format=torch.channels_last)
    part = reals(2, 5, 5, 7, dtype=torch.float32)
    F.write_channels_(buffer, part, 4)
    assert torch.equal(buffer[:, 4:9], part)
    assert (buffer[:, :4] == GUARD).all() and (buffer[:, 9:] == GUARD).all()
