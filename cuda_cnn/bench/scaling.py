"""How a layer's time grows with the batch, the threads and the size of its pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import report, run
from .cases import Problem
from .devices import Device
from .results import Results, key
from .run import Item, Settings
from .settings import precision
from .shapes import Layer, layers

__all__ = ["LAYERS", "SWEEPS", "points", "steps", "table"]

BATCHES = (1, 2, 4, 8, 16)
SIDES = (7, 14, 28, 56, 112)
SWEEPS = ("batch", "threads", "size")
LAYERS = (
    *(("resnet50", "layer2.1.conv2"), ("resnet50", "layer2.1.conv1"), ("resnet50", "layer1.0.bn1")),
    *(("alexnet", "features.2"), ("googlenet", "maxpool2")),
)


def points(sweep: str, batch: int, cores: int) -> list[int]:
    """The values that a sweep goes through."""
    if sweep == "batch":
        return list(BATCHES)
    if sweep == "size":
        return list(SIDES)
    return sorted({1, *(2**i for i in range(1, 10) if 2**i < cores), cores})


def steps(
    sweeps: tuple[str, ...], settings: Settings, device: Device, results: Results, deadline: float
) -> tuple[int, Iterator[dict]]:
    chosen = [layer for n, name in LAYERS for layer in layers(n) if layer.name == name]
    chosen = [layer for layer in chosen if not settings.ops or layer.op in settings.ops]
    cores = os.cpu_count() or 1
    todo = [
        (layer, sweep, value)
        for layer in chosen
        for sweep in sweeps
        if not (sweep == "threads" and device.kind != "cpu")
        for value in points(sweep, settings.batch, cores)
    ]
    timing = (settings.timings or (device.default_timing,))[0]

    def measured() -> Iterator[dict]:
        for layer, sweep, value in todo:
            if time.monotonic() > deadline:
                raise run.StoppedError
            row = _point(layer, sweep, value, timing, settings, device, results)
            if row is not None:
                results.add("scaling", row)
                yield {"line": "  ".join(_cells(row))}

    return len(todo), measured()


def _point(
    layer: Layer, sweep: str, value: int, timing: str, settings: Settings, device: Device, results: Results
) -> dict | None:
    """None where it is known already."""
    if sweep == "batch":
        settings = replace(settings, batch=value)
    elif sweep == "size":
        layer = replace(layer, shape=(layer.shape[0], value, value))
    threads = torch.get_num_threads()
    try:
        if sweep == "threads":
            torch.set_num_threads(value)
        item = Item(layer, settings.dtypes[0], settings.layouts[0], "forward", timing)
        row = {**item.row(settings), "sweep": sweep, "value": value}
        if key(row) in results.keys("scaling"):
            return None
        with precision(item.dtype), device.context():
            problem = Problem(layer, settings.batch, item.dtype, item.layout, device)
            row.update(run.row_of(problem, "forward", timing, replace(settings, memory=False)))
        return row
    finally:
        torch.set_num_threads(threads)


def _cells(row: dict) -> tuple[str, ...]:
    times = [f"{name} {report.duration(t['seconds'][0])}" for name, t in row["times"].items()]
    ratios = [f"{r[0]:.2f}× {name}" for name, r in row["ratios"].items()]
    return (f"{row['network']}/{row['layer']}", row["sweep"], str(row["value"]), *times, *ratios)


def table(rows: list[dict]) -> str:
    width = max(len(_cells(row)) for row in rows)
    lines = [(*cells, *[""] * (width - len(cells))) for cells in map(_cells, rows)]
    return report.plain(("layer", "sweep", "value", *[""] * (width - 3)), lines)
