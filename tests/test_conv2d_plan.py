"""Which kernel a convolution takes on CUDA: plan.cu on the host, for the networks' layers and for sizes beyond 2^31."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
#include "cuda/conv2d/plan.cu"
using namespace cuda_cnn;

extern "C" void plan_of(int direction, int dtype, int tf32, const int64_t* n, int64_t offset, int64_t* out) {
  Conv2dParams p{};
  p.dtype = static_cast<DType>(dtype);
  p.N = n[0], p.C = n[1], p.H = n[2], p.W = n[3], p.K = n[4], p.R = n[5], p.S = n[6], p.P = n[7], p.Q = n[8];
  p.stride_h = n[9], p.stride_w = n[10], p.pad_h = n[11], p.pad_w = n[12];
  p.dilation_h = n[13], p.dilation_w = n[14], p.groups = n[15];
  p.x_pixel = p.C, p.y_pixel = p.K, p.allow_tf32 = tf32;
  const auto pointer = reinterpret_cast<void*>(4096 + offset);
  p.x = p.weight = p.dy = pointer;
  p.y = p.dx = p.dweight = pointer;
  const cuda::conv2d::Plan plan = cuda::conv2d::plan(static_cast<Conv2dDirection>(direction), p);
  const int64_t values[] = {
      int64_t(plan.method), int64_t(plan.load), plan.tensor_cores,      plan.tile_rows,
      plan.tile_columns,    plan.splits,        plan.channels,          plan.block_h.extent,
      plan.block_w.extent,  plan.block_h.taps,  plan.block_w.taps,      plan.weight_row,
      plan.split_offset(),  plan.statistics_offset(), plan.source_offset(), plan.workspace_bytes()};
  for (int64_t value : values) *out++ = value;
}
"""
DIRECT, DEPTHWISE, FEW_CHANNELS, PRODUCT = range(4)
ASYNC, MAPPED, SCALAR = range(3)
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
BYTES = {FLOAT32: 4, FLOAT64: 8, BFLOAT16: 2, FLOAT16: 2}


class Plan(NamedTuple):
    method: int
    load: int
    tensor_cores: int
    tile_rows: int
    tile_columns: int
    splits: int
    channels: int
    rows: int
    columns: int
    taps_h: int
    taps_w: int
    weight_row: int
    split_offset: int
    statistics_offset: int
    source_offset: int
    workspace: int


class Sizes(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out(self) -> tuple[int, int]:
        extents = zip(
            (self.h, self.w), (self.r, self.s), self.stride, self.padding, self.dilation, strict=True
        )
        return tuple((n + 2 * pad - d * (kernel - 1) - 1) // step + 1 for n, kernel, step, pad, d in extents)


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[-1]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("plan")
    source, library = folder / "plan.cpp", folder / "plan.so"
    source.write_text(SOURCE)
    includes = [f"-I{ROOT / 'tests/emulation/include'}", f"-I{ROOT / 'csrc'}", "-DCUDA_CNN_EMULATED"]
    subprocess.run([*compiler, "-w", "-O1", "-shared", "-fPIC", *includes, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def plan(planner, direction: int, dtype: int, sizes: Sizes, tf32: bool = True, offset: int = 0) -> Plan:
    values = [*sizes[:7], *sizes.out(), *sizes.stride, *sizes.padding, *sizes.dilation, sizes.groups]
    out = (ctypes.c_int64 * len(Plan._fields))()
    numbers = (ctypes.c_int64 * len(values))(*values)
    planner.plan_of(direction, dtype, tf32, numbers, ctypes.c_int64(offset), out)
    return Plan(*out)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_stems_are_rearranged(planner, dtype):
    pack = 16 // BYTES[dtype]
    alexnet = plan(planner, FORWARD, dtype, Sizes(128, 3, 224, 224, 64, 11, 11, (4, 4), (2, 2)))
    assert (alexnet.load, alexnet.taps_h, alexnet.taps_w, alexnet.channels) == (ASYNC, 3, 3, 48)
    assert (alexnet.rows, alexnet.columns) == (57, 57)
    for direction in (FORWARD, WEIGHT_GRADIENT):
        resnet = plan(planner, direction, dtype, Sizes(256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)))
        assert (resnet.load, resnet.taps_h, resnet.channels) == (ASYNC, 4, {8: 16, 4: 12}[pack])
    vgg = plan(planner, FORWARD, dtype, Sizes(64, 3, 224, 224, 64, 3, 3, (1, 1), (1, 1)))
    assert (vgg.load, vgg.taps_h, vgg.channels) == (ASYNC, 3, {8: 8, 4: 4}[pack])
    gray = plan(planner, FORWARD, dtype, Sizes(256, 1, 32, 32, 32, 5, 5))
    assert (gray.method, gray.load, gray.channels) == (PRODUCT, SCALAR, 0)


@pytest.mark.parametrize("direction", [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
def test_few_channels(planner, direction):
    def method(sizes, dtype, **options):
        return plan(planner, direction, dtype, sizes, **options).method

    # LeNet-5's. The 16 to 120 channels of c5, with one output a plane, are a matrix product.
    c1, c3, c5 = (Sizes(256, c, n, n, k, 5, 5) for c, n, k in ((1, 32, 6), (6, 14, 16), (16, 5, 120)))
    for dtype in BYTES:
        assert method(c1, dtype) == method(c3, dtype) == FEW_CHANNELS and method(c5, dtype) == PRODUCT
        assert method(Sizes(128, 3, 32, 32, 16, 3, 3, (1, 1), (1, 1)), dtype) == FEW_CHANNELS
        assert method(c3._replace(groups=2), dtype) == PRODUCT  # one group a filter
        assert method(c3._replace(k=17), dtype) == method(c3._replace(c=9), dtype) == PRODUCT
        assert method(Sizes(1, 8, 40, 40, 16, 6, 6), dtype) == PRODUCT  # no room for the weights
    wide = c3._replace(c=8)  # three quarters of the tensor cores' columns empty, and yet faster
    assert method(wide, BFLOAT16) == method(wide, FLOAT32) == PRODUCT
    assert method(wide, FLOAT32, tf32=False) == method(wide, FLOAT64) == FEW_CHANNELS


def test_kernels_of_the_networks_layers(planner):
    layer = Sizes(64, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1))
    for direction in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
        for dtype in (BFLOAT16, FLOAT16, FLOAT32):
            p = plan(planner, direction, dtype, layer)
            assert (p.method, p.load, p.tensor_cores) == (PRODUCT, ASYNC, 1)
        strict = plan(planner, direction, FLOAT32, layer, tf32=False)
        assert (strict.method, strict.load, strict.tensor_cores) == (PRODUCT, ASYNC, 0)
        assert plan(planner, direction, FLOAT64, layer).load == SCALAR
        depthwise = layer._replace(groups=256)
        assert plan(planner, direction, BFLOAT16, depthwise).method == DEPTHWISE
        misaligned = plan(planner, direction, BFLOAT16, layer, offset=2)
        assert misaligned.load == (ASYNC if direction == FORWARD else SCALAR)
        assert (misaligned.channels > 0) == (direction == FORWARD)
    assert plan(planner, WEIGHT_GRADIENT, BFLOAT16, layer).splits > 1


# Each a power of two and a little, up to far beyond 2^31 in products.
EXTENT = st.builds(lambda power, more: 2**power + more, st.integers(0, 20), st.integers(0, 3))
SMALL = st.integers(1, 7)


@given(
    n=EXTENT,
    c=EXTENT,
    h=EXTENT,
    w=EXTENT,
    k=EXTENT,
    kernel=st.tuples(SMALL, SMALL),
    stride=st.tuples(SMALL, SMALL),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 2**20)),
    dilation=st.tuples(SMALL, st.integers(1, 2**20)),
    groups=st.sampled_from([1, 2, 3, 64, "each"]),
    dtype=st.sampled_from([FLOAT32, FLOAT64, BFLOAT16, FLOAT16]),
    direction=st.sampled_from([FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT]),
    tf32=st.booleans(),
    offset=st.sampled_from([0, 2, 8]),
)
def test_32_bit_arithmetic_and_grids_hold_what_they_are_given(
    planner, n, c, h, w, k, kernel, stride, padding, dilation, groups, dtype, direction, tf32, offset
):
    if groups == "each":
        groups, k = c, c
    else:
        c, k = c * groups, k * groups
    sizes = Sizes(n, c, h, w, k, *kernel, stride, padding, dilation, groups)
    p, q = sizes.out()
    assume(p > 0 and q > 0)
    if max(n * c * h * w, n * k * p * q, k * c // groups * kernel[0] * kernel[1]) > 2**38:
        return  # a terabyte: no card holds it, and no grid counts its tiles
    chosen = plan(planner, direction, dtype, sizes, tf32, offset)
    below = 2**31 - 1024  # what a tile past the end may still add
    offsets = (0, chosen.split_offset, chosen.statistics_offset, chosen.source_offset, chosen.workspace)
    assert list(offsets) == sorted(offsets) and all(at % 16 == 0 for at in offsets[:-1])
    if chosen.method == DIRECT:
        return  # in 64 bits
    assert n * h * w < below and n * p * q < below
    if chosen.method == DEPTHWISE:
        assert groups == c == k and -(-c // 16) <= 65535
        return
    if chosen.method == FEW_CHANNELS:
        assert groups == 1 and c <= 8 and k <= 16 and kernel[0] * kernel[1] * max(16 * c, 8 * k) <= 4096
        return
    assert chosen.tile_rows in (64, 128) and chosen.tile_columns in (64, 128)
    assert c // groups * kernel[0] * kernel[1] < below and k // groups * kernel[0] * kernel[1] < below
    assert groups * (16 if direction == INPUT_GRADIENT else 1) <= 65535 and 1 <= chosen.splits <= 128
    reduction = kernel[0] * kernel[1] * (c // groups)
    if chosen.channels:
        assert direction != INPUT_GRADIENT and chosen.load == ASYNC
        assert (
            chosen.channels * BYTES[dtype] % 16 == 0
            and chosen.taps_h * chosen.taps_w * chosen.channels < below
        )
        cells = n * chosen.rows * chosen.columns
        assert cells < below and chosen.workspace - chosen.source_offset == (
            cells * chosen.channels * groups * BYTES[dtype]
        )
        reduction = chosen.taps_h * chosen.taps_w * chosen.channels
    rows = {FORWARD: n * p * q, INPUT_GRADIENT: n * h * w, WEIGHT_GRADIENT: k // groups}[direction]
    columns = {FORWARD: k // groups, INPUT_GRADIENT: c // groups, WEIGHT_GRADIENT: reduction}[direction]
    assert -(-rows // chosen.tile_rows) * -(-columns // chosen.tile_columns) < 2**31
    if direction != WEIGHT_GRADIENT:
        assert chosen.weight_row * BYTES[dtype] % 16 == 0
