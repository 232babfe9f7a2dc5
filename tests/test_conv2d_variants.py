"""Every tile and load of the CUDA products, forced one after the other: the same exact sums from each of them."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from emulation import SCHEDULES, Unavailable, emulated, emulated_operators
from helpers import assert_bitwise, integers
from test_conv2d import CASES as GEOMETRIES

from cuda_cnn import functional as F

# x, weight, then stride, padding, dilation, groups: several tiles in every direction, the last ones cut off
CASES = {
    "3x3": ((2, 16, 9, 13), (136, 16, 3, 3), (1, 1, 1, 1)),
    "strided": ((2, 72, 7, 8), (16, 72, 3, 2), (2, 1, 1, 1)),
    "groups": ((1, 32, 12, 11), (48, 16, 3, 3), (1, 2, 1, 2)),
    "odd channels": ((1, 3, 21, 20), (7, 3, 5, 5), (3, 2, 1, 1)),
    "stem": ((1, 3, 17, 19), (16, 3, 7, 7), (2, 3, 1, 1)),
    "groups of odd channels": ((2, 15, 9, 8), (40, 3, 4, 3), ((1, 2), (1, 0), 1, 5)),
}
VARIANTS = [("128x128", "async"), ("128x64", "async"), ("64x64", "async")]
VARIANTS += [("", load) for load in ("mapped", "scalar", "rearranged")]
FEW = {
    "lenet c3": ((2, 6, 9, 10), (16, 6, 5, 5), (1, 0, 1, 1)),
    "eight channels": ((1, 8, 9, 10), (9, 8, 3, 4), ((2, 3), (1, 2), 1, 1)),
    **{
        name: GEOMETRIES[name]
        for name in ("lenet c1", "stride beyond the kernel", "padding beyond the kernel", "dilation")
        + ("stride and dilation share a factor", "stride and dilation do not")
    },
}
# The cases that a kernel of its own takes, which the others can take too.
KERNELS = [(case, kernel) for case in FEW for kernel in ("direct", "few_channels", "product")]
KERNELS += [("depthwise", kernel) for kernel in ("direct", "depthwise", "product")]
DEVICES = ["cuda_emulated", *(["cuda"] if torch.cuda.is_available() else [])]
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=["bfloat16", "float16", "tf32", "float32"])
def dtype(request) -> Iterator[torch.dtype]:
    tf32 = request.param == "tf32"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        yield torch.float32 if tf32 else getattr(torch, request.param)


def run(case: str, dtype: torch.dtype, device: str, **options) -> list[torch.Tensor]:
    """y, dx, dweight of small whole numbers: exact in every algorithm."""
    x_shape, weight_shape, geometry = CASES[case]
    x, weight = (
        integers(*shape, dtype=dtype, low=-2, high=3, seed=seed).to(device, memory_format=CHANNELS_LAST)
        for seed, shape in enumerate((x_shape, weight_shape))
    )
    x.requires_grad_()
    weight.requires_grad_()

    def passes(function) -> list[torch.Tensor]:
        y = function(x, weight, None, *geometry)
        dy = integers(*y.shape, dtype=dtype, low=-1, high=2, seed=9).to(device, memory_format=CHANNELS_LAST)
        return [y, *torch.autograd.grad(y, (x, weight), dy)]

    if device == "cuda":
        return passes(F.conv2d)
    if "conv2d" not in emulated_operators():
        pytest.skip("conv2d has no CUDA kernel")
    try:
        with emulated(**options):
            return passes(F.conv2d)
    except Unavailable as reason:
        pytest.skip(str(reason))


def expected(case: str, dtype: torch.dtype) -> list[torch.Tensor]:
    x_shape, weight_shape, geometry = CASES[case]
    x, weight = (
        integers(*shape, dtype=dtype, low=-2, high=3, seed=seed).double().requires_grad_()
        for seed, shape in enumerate((x_shape, weight_shape))
    )
    y = torch.nn.functional.conv2d(x, weight, None, *geometry)
    dy = integers(*y.shape, dtype=dtype, low=-1, high=2, seed=9).double()
    return [t.to(dtype) for t in (y, *torch.autograd.grad(y, (x, weight), dy))]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v[0] or v[1])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_is_exact(monkeypatch, where, dtype, case, variant):
    tile, load = variant
    monkeypatch.setenv("CUDA_CNN_CONV2D_TILE", tile)
    monkeypatch.setenv("CUDA_CNN_CONV2D_LOAD", load)
    actual = run(case, dtype, "cuda" if where == "cuda" else "cpu", races=True, bounds=True)
    for name, a, e in zip(("y", "dx", "dweight"), actual, expected(case, dtype), strict=True):
        assert_bitwise(a, e, what=f"{name} of {case}, {tile or load}")


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("case,kernel", KERNELS)
def test_every_kernel_is_exact(monkeypatch, where, dtype, case, kernel):
    monkeypatch.setitem(CASES, case, FEW.get(case) or GEOMETRIES[case])
    monkeypatch.setenv("CUDA_CNN_CONV2D_KERNEL", kernel)
    actual = run(case, dtype, "cuda" if where == "cuda" else "cpu", races=True, bounds=True)
    for name, a, e in zip(("y", "dx", "dweight"), actual, expected(case, dtype), strict=True):
        assert_bitwise(a, e, what=f"{name} of {case}, {kernel}")


def test_kernels_in_words(monkeypatch):
    try:
        with emulated():
            name = torch.ops.cuda_cnn_emulated.conv2d_cuda_kernel
    except Unavailable as reason:
        pytest.skip(str(reason))

    def words(c: int, k: int, kernel: int, dtype: torch.dtype) -> str:
        return name("forward", [256, c, 28, 28], [k, c, kernel, kernel], [1, 1], [0, 0], [1, 1], 1, dtype)

    assert words(6, 16, 5, torch.float32) == "few_channels"
    assert words(64, 64, 3, torch.bfloat16) == "product 128x64, async, tensor cores"
    assert words(3, 64, 7, torch.bfloat16) == "product 128x64, rearranged, tensor cores"
    assert words(64, 64, 3, torch.float64) == "product 64x64, scalar"
    for case, kernel in KERNELS:  # each takes what it is told to take
        monkeypatch.setenv("CUDA_CNN_CONV2D_KERNEL", kernel)
        x, weight, (stride, padding, dilation, groups) = FEW.get(case) or GEOMETRIES[case]
        pairs = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
        for direction in ("forward", "input_grad", "weight_grad"):
            assert name(direction, x, weight, *pairs, groups, torch.float32).startswith(kernel)


@pytest.mark.parametrize("case", CASES)
def test_no_schedule_changes_a_bit(dtype, case):
    """Real numbers, whose sums depend on their order: it must be the kernels' own, not the threads'."""
    x_shape, weight_shape, geometry = CASES[case]
    x, weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
            dtype, memory_format=CHANNELS_LAST
        )
        for seed, shape in enumerate((x_shape, weight_shape))
    )
    x.requires_grad_()
    weight.requires_grad_()
    runs = []
    for schedule, landing in itertools.product(SCHEDULES, ["late", "early"]):
        try:
            with emulated(schedule=schedule, landing=landing):
                y = F.conv2d(x, weight, None, *geometry)
                runs.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
        except Unavailable as reason:
            pytest.skip(str(reason))
    for others in runs[1:]:
        for first, other in zip(runs[0], others, strict=True):
            assert torch.equal(first, other)
