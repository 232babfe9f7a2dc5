"""No launch has more blocks than the hardware counts: 65535 along a grid's y and z, 2^31 - 1 along x."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import Unavailable, emulated

from cuda_cnn import functional as F

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
#include "cuda/grid.h"
extern "C" bool fits(int64_t x, int64_t y, int64_t z) { return cuda_cnn::cuda::Grid(x, y, z).fits(); }
"""


def test_limits(tmp_path):
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[-1]) is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "grid.cpp", tmp_path / "grid.so"
    source.write_text(SOURCE)
    command = [*compiler, "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).fits
    function.restype = ctypes.c_bool

    def fits(*extents):
        return function(*map(ctypes.c_int64, extents))

    assert fits(2**31 - 1, 65535, 65535)
    for beyond in ((2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**32 + 1, 1, 1), (1, 2**32 + 1, 1)):
        assert not fits(*beyond)


# More blocks of 32 channels, rows or images than a y or z counts.
SHAPES = [(1, 32 * 65536, 1, 2), (70000, 1, 3, 3), (1, 1, 70000, 4), (1, 3, 4, 70000)]


def vector(x):
    return x.new_ones(x.shape[1])


def batch_norm(x):
    y = F.batch_norm(x, vector(x), vector(x), vector(x), vector(x), True)
    return y, F.batch_norm(x, vector(x), vector(x), vector(x), vector(x))


OPERATORS = {
    "conv2d": lambda x: F.conv2d(x, x.new_ones(3, x.shape[1], 1, 1), x.new_ones(3)),
    "conv2d of filters": lambda x: F.conv2d(x[:1, :1, :1, :1], x.new_ones(x.numel(), 1, 1, 1)),
    "conv2d of groups": lambda x: F.conv2d(x, x.new_ones(2 * x.shape[1], 1, 1, 1), groups=x.shape[1]),
    "conv2d depthwise": lambda x: F.conv2d(x, x.new_ones(x.shape[1], 1, 1, 1), groups=x.shape[1]),
    "conv2d strided": lambda x: F.conv2d(x, x.new_ones(1, x.shape[1], 1, 2), stride=2, padding=1),
    "conv2d with statistics": lambda x: F.conv2d_fused(
        x, x.new_ones(3, x.shape[1], 1, 1), None, vector(x), vector(x), True, want_stats=True
    ),
    "channel_map": lambda x: F.channel_map(x, vector(x), vector(x), x, True),
    "channel_statistics": F.channel_statistics,
    "max_pool2d": lambda x: F.max_pool2d(x, 1, return_indices=True)[0],
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "batch_norm": batch_norm,
    "concat": lambda x: F.concat([x, x], 1),
    "subsample": lambda x: F.subsample(x, vector(x), vector(x), 1),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_extents_beyond_65535_blocks(name, shape, memory_format):
    """Launches are looked at, not run: the emulator refuses what a driver would."""
    x = torch.ones(shape).contiguous(memory_format=memory_format).requires_grad_()
    try:
        with emulated(dry_run=True):
            outputs = OPERATORS[name](x)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
    except Unavailable as reason:
        pytest.skip(str(reason))
