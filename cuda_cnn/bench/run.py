"""The layers of the suites, measured one by one into a `Results`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import roofline
from .cases import Case, Problem, UnavailableError, WrongResultError
from .devices import Device
from .forms import FORMS
from .results import Results, key
from .settings import UnequalError, check_equal, dtype_of, precision
from .shapes import NETWORKS, Layer, layers, words
from .stats import ratio, spread
from .timing import interleave
from .work import passes, work

__all__ = ["BATCH", "Item", "Settings", "StoppedError", "measure", "plan", "row_of"]

BATCH = 4


class StoppedError(Exception):
    """The time that the run was given is over."""


@dataclass(frozen=True)
class Settings:
    """What is measured. Lists are crossed; seconds and rounds are those of a comparison (the first implementation
    beside the others)."""

    suites: tuple[str, ...] = NETWORKS
    ops: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    passes: tuple[str, ...] = ("forward", "dgrad", "wgrad")
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = ("channels_last",)
    implementations: tuple[str, ...] = ("cuda_cnn", "torch")
    forms: tuple[str, ...] = FORMS
    timings: tuple[str, ...] = ()
    batch: int = BATCH
    seconds: float = 0.5
    rounds: int = 7
    memory: bool = True


@dataclass(frozen=True)
class Item:
    """A row to come. Its order keeps what shares tensors together."""

    layer: Layer
    dtype: str
    layout: str
    direction: str
    timing: str

    def row(self, settings: Settings) -> dict:
        layer = self.layer
        return {
            "network": layer.network,
            "layer": layer.name,
            "op": layer.op,
            "shape": list(layer.shape),
            "args": {k: list(v) if isinstance(v, tuple) else v for k, v in layer.args.items()},
            "words": words(layer).strip(),
            "count": layer.count,
            "pass": self.direction,
            "dtype": self.dtype,
            "layout": self.layout,
            "batch": settings.batch,
            "timing": self.timing,
            "threads": torch.get_num_threads(),
        }


def plan(settings: Settings, device: Device) -> list[Item]:
    """Every row of the run, those of one layer side by side. Refuses what cannot be compared fairly."""
    timings = settings.timings or (device.default_timing,)
    for timing in timings:
        device.clock(timing)
    for dtype in settings.dtypes:
        check_equal(dtype, device.kind)
    chosen = [layer for suite in settings.suites for layer in layers(suite)]
    chosen = [layer for layer in chosen if not settings.ops or layer.op in settings.ops]
    if settings.names:
        chosen = [layer for layer in chosen if any(part in layer.name for part in settings.names)]
    return [
        Item(layer, dtype, layout, direction, timing)
        for layer in chosen
        for dtype in settings.dtypes
        for layout in settings.layouts
        for direction in settings.passes
        if direction in passes(layer.op)
        for timing in timings
    ]


def measure(
    settings: Settings,
    device: Device,
    results: Results,
    items: list[Item] | None = None,
    deadline: float = float("inf"),
    section: str = "rows",
) -> Iterator[dict]:
    """Measures what `results` does not hold yet; yields each row. Raises StoppedError at the deadline (time.monotonic).

    Interrupted, `results` holds every row that was finished.
    """
    items = plan(settings, device) if items is None else items
    known = results.keys(section)
    problem, of = None, None
    for item in items:
        row = item.row(settings)
        if key(row) in known:
            continue
        if time.monotonic() > deadline:
            raise StoppedError
        with precision(item.dtype), device.context():
            if item.dtype not in results.document["roofline"]:
                found = roofline.measure(device, dtype_of(item.dtype))
                results.document["roofline"][item.dtype] = dataclasses.asdict(found)
            tensors = (item.layer, item.dtype, item.layout)
            if tensors != of:
                problem, of = Problem(item.layer, settings.batch, *tensors[1:], device), tensors
            row.update(row_of(problem, item.direction, item.timing, settings))
        results.add(section, row)
        yield row


def row_of(problem: Problem, direction: str, timing: str, settings: Settings) -> dict:
    """What was measured: times of each implementation, ratios to the first one, and what is absent or wrong."""
    device = problem.device
    least = work(problem.layer, direction, problem.batch, dtype_of(problem.dtype))
    row: dict = {
        "flops": least.flops,
        "bytes": least.bytes,
        "times": {},
        "ratios": {},
        "absent": {},
        "wrong": {},
    }
    cases: dict[str, Case] = {}
    for name in settings.implementations:
        try:
            cases[name] = problem.case(direction, name)
        except (UnavailableError, UnequalError, NotImplementedError, torch.OutOfMemoryError) as reason:
            row["absent"][name] = str(reason)
        except WrongResultError as reason:
            row["wrong"][name] = str(reason)
    if not cases:
        return row
    calls = {name: case.call for name, case in cases.items()}
    times = interleave(calls, settings.seconds * len(calls) / 2, device.clock(timing), settings.rounds)
    common = set.intersection(*(set(case.notes) for case in cases.values()))  # what is equal needs no label
    for name, case in cases.items():
        middle = spread(times[name])
        row["times"][name] = {
            "seconds": list(middle[:3]),
            "rounds": middle.count,
            "error": case.error,
            "algorithm": case.algorithm,
            "notes": [note for note in case.notes if note not in common],
            "kernels": device.kernels(case.call.run),
            "memory": _peak(problem, case) if settings.memory else None,
        }
    first = next(iter(cases))
    if first == settings.implementations[0]:
        row["ratios"] = {name: list(ratio(times[first], times[name])) for name in cases if name != first}
    return row


def _peak(problem: Problem, case: Case) -> int:
    """Bytes above what was held before the call."""
    with case.call.around():
        return max((held for _, held in problem.device.memory(case.call.run)), default=0)
