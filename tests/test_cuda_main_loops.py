"""Convolution's main loops on emulated CUDA: what their accesses cost, counted access by access.

Aligned channels_last layouts must come without a bank conflict and without a wasted sector.
"""

from collections.abc import Iterator

import pytest
import torch
from emulation import Counter, Engine, Unavailable, emulated, emulated_operators, torch_engine
from helpers import reals

from cuda_cnn import functional as F

# (x, weight, stride): tiles cut off at the borders, several blocks, both halves of a strided input gradient
CASES = {
    "3x3": ((2, 64, 14, 14), (64, 64, 3, 3), 1),
    "1x1": ((2, 128, 7, 7), (128, 128, 1, 1), 1),
    "strided": ((1, 64, 15, 15), (128, 64, 3, 3), 2),
    "stem": ((2, 3, 19, 19), (64, 3, 7, 7), 2),
}
SHARED = ["shared load", "ldmatrix", "cp.async store"]
MAIN_LOOP = {"tile.cuh", "product.cuh", "load.cuh", "weight_grad.cuh"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    if "conv2d" not in emulated_operators():
        pytest.skip("conv2d has no CUDA kernel")
    try:
        return torch_engine()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["bfloat16", "float16", "tf32", "float32"])
def dtype(request) -> Iterator[torch.dtype]:
    tf32 = request.param == "tf32"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        yield torch.float32 if tf32 else getattr(torch, request.param)


def count(engine: Engine, case: str, dtype: torch.dtype, pass_: str) -> list[Counter]:
    x_shape, weight_shape, stride = CASES[case]
    x, weight = (
        reals(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last).requires_grad_()
        for seed, shape in enumerate((x_shape, weight_shape))
    )
    needed = {"forward": [], "input gradient": [x], "weight gradient": [weight]}[pass_]
    for tensor in (x, weight):
        tensor.requires_grad_(any(tensor is t for t in needed))
    with emulated():
        y = F.conv2d(x, weight, stride=stride, padding=weight_shape[2] // 2)
        engine.reset_counters()
        with engine.options(counters=True):
            if needed:
                torch.autograd.grad(
                    y, needed, torch.ones_like(y).contiguous(memory_format=torch.channels_last)
                )
            else:
                F.conv2d(x, weight, stride=stride, padding=weight_shape[2] // 2)
    return engine.counters


@pytest.mark.parametrize("pass_", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("case", CASES)
def test_no_bank_conflict_and_full_sectors(engine, dtype, case, pass_):
    if (case, pass_) == ("stem", "input gradient"):
        pytest.skip("a first layer has none, and writes of three channels fill no sector")
    counters = count(engine, case, dtype, pass_)
    main_loop = [counter for counter in counters if counter.site.split(":")[0] in MAIN_LOOP]
    shared = [counter for counter in main_loop if counter.traffic in SHARED]
    loads = [counter for counter in main_loop if counter.traffic == "cp.async load"]
    assert {"cp.async store"} < {counter.traffic for counter in shared}, counters
    assert loads, counters
    for counter in shared:
        assert counter.cost == counter.ideal, counter
    for counter in loads:
        # A stem's cells of 12 float32 are 48 bytes: what a request reads may begin and end within a sector.
        partial = counter.requests if case == "stem" and dtype == torch.float32 else 0
        assert counter.cost <= counter.ideal + partial, counter
    stores = [counter for counter in counters if counter.traffic == "global store"]
    assert stores
    for counter in stores:
        assert counter.cost == counter.ideal, counter
