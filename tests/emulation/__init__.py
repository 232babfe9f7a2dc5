"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ and run by an emulation of the CUDA execution model.

    with emulated(schedule="priorities", seed=3):      # the operators run their CUDA source
        y = cuda_cnn.functional.conv2d(x, w)

What it is and what it cannot know: README.md.
"""

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .build import ROOT, Unavailable, build

SCHEDULES = ["forward", "reverse", "random", "priorities"]
LANDINGS = ["late", "early", "random"]
DEFAULTS = {
    "schedule": "priorities",
    "landing": "late",
    "seed": 1,
    "races": False,
    "bounds": False,
    "counters": False,
    "launch_error": 0,
    "attributes_error": 0,
    "gpu": 0,
    "dry_run": False,
}

__all__ = [
    "Counter",
    "Engine",
    "LANDINGS",
    "SCHEDULES",
    "Unavailable",
    "emulated",
    "emulated_operators",
    "on_gpu",
    "torch_engine",
]


@dataclass(frozen=True)
class Counter:
    """What the requests of warps at one line cost: passes over shared memory's banks, or global sectors."""

    traffic: str  # "shared load", "shared store", "ldmatrix", "cp.async store", "global load", …
    site: str  # "conv2d.cu:120"
    requests: int
    cost: int
    ideal: int


class Engine:
    """One compiled library with its emulator."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("emulation_report", "emulation_counters"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.emulation_set.restype = ctypes.c_bool
        self.set(**DEFAULTS)

    def set(self, **options: str | int | bool) -> None:
        """schedule (of SCHEDULES), landing (of LANDINGS), seed, races, bounds, counters; launch_error and
        attributes_error: what these calls of CUDA shall answer; gpu: the current device's number; dry_run: launches
        are looked at, not run."""
        for name, value in options.items():
            if isinstance(value, str):
                value = {"schedule": SCHEDULES, "landing": LANDINGS}[name].index(value)
            if not self.library.emulation_set(name.encode(), int(value)):
                raise ValueError(f"the emulator has no option {name}={value}")

    @contextlib.contextmanager
    def options(self, **options: str | int | bool) -> Iterator[None]:
        self.set(**options)
        try:
            yield
        finally:
            self.set(**DEFAULTS)

    @property
    def report(self) -> str:
        """What the last launch did wrong, one line a site and kind; empty: nothing."""
        return self.resolve(self.library.emulation_report().decode())

    def reset_counters(self) -> None:
        self.library.emulation_reset_counters()

    @property
    def counters(self) -> list[Counter]:
        """Per line, since reset_counters."""
        totals: dict[tuple[str, str], list[int]] = {}
        for line in self.resolve(self.library.emulation_counters().decode()).splitlines():
            traffic, site, *numbers = line.split("\t")
            total = totals.setdefault((traffic, site), [0, 0, 0])
            for i, number in enumerate(numbers):
                total[i] += int(number)
        return [Counter(*key, *total) for key, total in totals.items()]

    def resolve(self, text: str) -> str:
        """The text with addresses of instructions (@0x12ab) replaced by the lines they came from."""
        return re.sub(r"@(0x[0-9a-f]+)", lambda match: self._line_of(match.group(1)), text)

    @functools.cache  # noqa: B019 (one engine a library, for the life of the process)
    def _line_of(self, offset: str) -> str:
        if shutil.which("addr2line") is None:
            return "@" + offset
        command = ["addr2line", "-e", str(self.path), offset]
        line = subprocess.run(command, capture_output=True, text=True).stdout.split(" (")[0].strip()
        return line.rsplit("/", 1)[-1] or "@" + offset

    @contextlib.contextmanager
    def registered(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """For bounds=True: kernels may touch the storages of these tensors."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        storages.pop(0, None)
        for pointer, size in storages.items():
            self.library.emulation_register(ctypes.c_void_p(pointer), ctypes.c_size_t(size))
        try:
            yield
        finally:
            for pointer in storages:
                self.library.emulation_unregister(ctypes.c_void_p(pointer))


# ---- The operators over emulated kernels -------------------------------------------------------------------


def emulated_operators() -> set[str]:
    """The operators that have CUDA kernels: csrc/cuda/<name>.cu, or a folder of them."""
    folder = ROOT / "csrc/cuda"
    return {path.relative_to(folder).parts[0].removesuffix(".cu") for path in folder.rglob("*.cu")}


@functools.cache
def torch_engine() -> Engine:
    """The engine of the library torch.ops.cuda_cnn_emulated; raises Unavailable where there can be none."""
    names = {*emulated_operators(), "allocate"}
    bindings = [path for path in sorted((ROOT / "csrc/ops").rglob("*.cpp")) if path.stem in names]
    bindings += [Path(__file__).with_name(name) for name in ("allocator.cpp", "faked.cpp")]
    path = build(f"operators-{torch.__version__}", sorted((ROOT / "csrc/cuda").rglob("*.cu")), bindings)
    torch.ops.load_library(str(path))
    return Engine(path)


class _OnEmulatedKernels(TorchDispatchMode):
    """Leads torch.ops.cuda_cnn to torch.ops.cuda_cnn_emulated, and tells the engine about the tensors of each call."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        emulated = getattr(torch.ops.cuda_cnn_emulated, func.__name__.partition(".")[0], None)
        if func.namespace != "cuda_cnn" or emulated is None:
            return func(*args, **kwargs)
        values = [*args, *kwargs.values()]
        values += [item for value in values if isinstance(value, list | tuple) for item in value]
        with self._engine.registered([value for value in values if _has_storage(value)]):
            try:
                return emulated(*args, **kwargs)
            except RuntimeError as error:
                raise type(error)(self._engine.resolve(str(error))) from None


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def on_gpu(x: torch.Tensor, gpu: int = 0) -> torch.Tensor:
    """A tensor that says it is on that GPU; its memory is x's. Operators check it and go no further."""
    torch_engine()
    return torch.ops.cuda_cnn_emulated.on_gpu(x, gpu)


@contextlib.contextmanager
def emulated(**options: str | int | bool) -> Iterator[Engine]:
    """Leads cuda_cnn's operators to the emulated kernels; options as Engine.set takes them."""
    engine = torch_engine()
    with engine.options(**options), _OnEmulatedKernels(engine):
        yield engine
