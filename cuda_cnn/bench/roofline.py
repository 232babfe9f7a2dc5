"""The machine's limits, measured on the spot: what it copies and what it multiplies (Williams, Waterman, Patterson:
Roofline, CACM 2009)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .devices import Device
from .work import Work

__all__ = ["Roofline", "measure"]

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS = 0.4


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes a second of a copy, read and write. peak: FLOP a second of a square matrix product."""

    bandwidth: float
    peak: float

    def seconds(self, work: Work) -> float:
        """The least time for it: that of its multiplications or of its bytes, the longer one."""
        return max(work.flops / self.peak, work.bytes / self.bandwidth)

    def attainable(self, intensity: float) -> float:
        """FLOP a second at so many FLOPs a byte."""
        return min(self.peak, intensity * self.bandwidth)


def measure(
    device: Device, dtype: torch.dtype, side: int | None = None, copy_bytes: int | None = None
) -> Roofline:
    """The best of what is tried in about a second.

    On a CPU the peak is that of the dtype or of float32, whichever has the faster small product: a large one of 16 bits
    would take minutes where there are no units for it.
    """
    copy_bytes = copy_bytes or COPY_BYTES[device.kind]
    bandwidth = _copy(device, copy_bytes)
    side = side or SIDE[device.kind]
    if device.kind == "cpu" and dtype != torch.float32:
        small = {d: _product(device, d, side // 8) for d in (dtype, torch.float32)}
        dtype = max(small, key=small.__getitem__)
    return Roofline(bandwidth, _product(device, dtype, side))


def _copy(device: Device, size: int) -> float:
    source = torch.zeros(size, dtype=torch.int8, device=device.torch_device)
    target = torch.zeros_like(source)
    return 2 * size / _best(device, lambda: target.copy_(source))


def _product(device: Device, dtype: torch.dtype, side: int) -> float:
    a = torch.ones(side, side, dtype=dtype, device=device.torch_device)
    out = torch.empty_like(a)
    return 2 * side**3 / _best(device, lambda: torch.mm(a, a, out=out))


def _best(device: Device, run) -> float:
    run()
    device.synchronize()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        run()
        device.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
