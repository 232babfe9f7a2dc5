"""What a device measures: its clocks (cold, graph, e2e) and the memory that a call takes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ..env import cpu_model
from .timing import Clock, WallClock

__all__ = ["TIMINGS", "CpuDevice", "CudaClock", "CudaDevice", "Device", "device", "profiler"]

TIMINGS = ("cold", "graph", "e2e")
# A cold call finds nothing of the last one: what is written in between is larger than any last-level cache here.
CPU_FLUSH_BYTES = 256 << 20
GRAPH_COPIES = 10
WARM_UP = 3


class Device(Protocol):
    """torch_device: where tensors live. name: in words."""

    torch_device: torch.device
    kind: str
    default_timing: str

    @property
    def name(self) -> str: ...

    def clock(self, timing: str) -> Clock: ...

    def synchronize(self) -> None: ...

    def context(self) -> contextlib.AbstractContextManager:
        """In which everything is allocated and run."""
        ...

    def memory(self, run: Callable[[], object]) -> list[tuple[float, int]]:
        """(second, bytes above the start) during one run."""
        ...

    def kernels(self, run: Callable[[], object]) -> list[str]:
        """The device's own names of what runs; none for a CPU."""
        ...


class CpuDevice:
    kind, default_timing = "cpu", "e2e"
    torch_device = torch.device("cpu")

    @property
    def name(self) -> str:
        return cpu_model()

    def clock(self, timing: str) -> Clock:
        if timing == "graph":
            raise ValueError("--timing graph: CUDA graphs need --device cuda; a CPU has cold and e2e")
        if timing == "cold":
            buffer = torch.empty(CPU_FLUSH_BYTES, dtype=torch.int8)
            return WallClock(lambda: buffer.fill_(1))
        return WallClock()

    def synchronize(self) -> None:
        pass

    def context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def memory(self, run: Callable[[], object]) -> list[tuple[float, int]]:
        return allocations(run, "CPU")

    def kernels(self, run: Callable[[], object]) -> list[str]:
        return []


class CudaDevice:
    """A GPU. `api` is torch.cuda, or what stands in for it where the kernels are emulated."""

    kind, default_timing = "cuda", "cold"

    def __init__(self, api: Any = torch.cuda, torch_device: str = "cuda") -> None:
        self.api, self.torch_device, self.stream = api, torch.device(torch_device), None

    @property
    def name(self) -> str:
        return self.api.get_device_name()

    def clock(self, timing: str) -> Clock:
        return CudaClock(timing, self)

    def synchronize(self) -> None:
        self.api.synchronize()

    def context(self) -> contextlib.AbstractContextManager:
        """A stream of its own: gradients run where the forward pass ran, and the default one takes no capture."""
        if self.stream is None:
            self.stream = self.api.Stream()
        return self.api.stream(self.stream)

    def memory(self, run: Callable[[], object]) -> list[tuple[float, int]]:
        self.synchronize()
        return allocations(run, "CUDA", self.synchronize)

    def kernels(self, run: Callable[[], object]) -> list[str]:
        if self.torch_device.type != "cuda":
            return []
        with profiler(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run()
            self.synchronize()
        return list(dict.fromkeys(event.name for event in seen.events()))

    def flush(self) -> Callable[[], object]:
        """Writes a buffer of twice the L2."""
        size = 2 * self.api.get_device_properties(None).L2_cache_size
        buffer = torch.empty(size, dtype=torch.int8, device=self.torch_device)
        return buffer.zero_


class CudaClock:
    """cold: between two events, after the L2 was flushed (which also hides the launch). graph: a replayed graph of
    ten calls, warm, without launches. e2e: the host's time from the call to the end of its work."""

    def __init__(self, timing: str, device: CudaDevice) -> None:
        self.timing, self.device, self.api = timing, device, device.api
        self.repeatable = timing == "e2e"
        self.flush = device.flush() if timing == "cold" else None

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]:
        if self.timing != "graph":
            return run
        for _ in range(WARM_UP):
            run()
        self.device.synchronize()
        graph = self.api.CUDAGraph()
        with self.api.graph(graph, stream=self.api.current_stream()):
            for _ in range(GRAPH_COPIES):
                run()
        return graph.replay

    def sample(self, run: Callable[[], object], repeats: int) -> float:
        if self.timing == "e2e":
            self.device.synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            self.device.synchronize()
            return (time.perf_counter() - began) / repeats
        begin, end = (self.api.Event(enable_timing=True) for _ in range(2))
        if self.flush:
            self.flush()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / (GRAPH_COPIES if self.timing == "graph" else 1)


def device(name: str) -> Device:
    """ "cpu", "cuda", or "auto": the GPU where torch sees one. ValueError where it cannot be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    if name.split(":")[0] != "cuda":
        raise ValueError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees no GPU (see: python -m cuda_cnn env)"
        )
    return CudaDevice(torch_device=name)


@contextlib.contextmanager
def profiler(**options: Any) -> Iterator[torch.profiler.profile]:
    """torch.profiler.profile, without the lines that its library writes past Python when it starts and stops."""
    made = torch.profiler.profile(**options)
    with _no_stderr():
        made.__enter__()
    try:
        yield made
    finally:
        with _no_stderr():
            made.__exit__(None, None, None)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def allocations(
    run: Callable[[], object], kind: str, synchronize: Callable[[], None] = lambda: None
) -> list[tuple[float, int]]:
    """What torch's allocator gave and took during one run, as the profiler saw it: (second, bytes held)."""
    with profiler(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
        synchronize()
    wanted = getattr(torch.autograd.DeviceType, kind)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.device_type() == wanted)
    held, curve = 0, []
    for when, size in events:
        held += size
        curve.append((1e-9 * (when - events[0][0]), held))
    return curve
