"""Each operator from its naive form to the final one, so that a reader sees what each idea gains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from .. import _C
from . import report, run
from .cases import Problem
from .devices import Device
from .results import Results, key
from .run import Item, Settings
from .settings import precision
from .shapes import layers

__all__ = ["RUNGS", "steps", "table"]

# operator: the layer it is climbed on.
RUNGS = {
    "conv2d": ("resnet50", "layer1.0.conv2"),
    "max_pool2d": ("googlenet", "maxpool1"),
    "local_response_norm": ("alexnet", "features.2"),
    "batch_norm": ("resnet50", "layer1.0.bn1"),
    "concat": ("densenet121", "features.denseblock1"),
    "subsample": ("lenet5", "s2"),
}


def variants(op: str, device: Device) -> list[tuple[str, str]]:
    """(words, implementation), the naive one first."""
    conv2d = op == "conv2d"
    found = [("loops", "cuda_cnn:reference")] if conv2d else []
    found += [("formula in tensor arithmetic", "reference")]
    if device.kind == "cpu":  # the best instruction set is the chosen one
        found += [(f"kernel, {name}", f"cuda_cnn:{name}") for name in _C.cpu_isas()[:-1]]
        if conv2d:
            found += [("packed matrix product", "cuda_cnn:gemm"), ("Winograd", "cuda_cnn:winograd")]
    return [*found, ("kernel as chosen", "cuda_cnn"), ("torch", "torch")]


def steps(
    settings: Settings, device: Device, results: Results, deadline: float
) -> tuple[int, Iterator[dict]]:
    """A row an operator and pass: forward and all gradients."""
    ops = settings.ops or tuple(RUNGS)
    passes = [p for p in ("forward", "full") if p in settings.passes] or ["forward"]
    timing = (settings.timings or (device.default_timing,))[0]
    todo = [(op, p) for op in ops for p in passes]

    def measured() -> Iterator[dict]:
        for op, direction in todo:
            if time.monotonic() > deadline:
                raise run.StoppedError
            network, name = RUNGS[op]
            layer = next(layer for layer in layers(network, op) if layer.name == name)
            item = Item(layer, settings.dtypes[0], settings.layouts[0], direction, timing)
            row = item.row(settings)
            if key(row) in results.keys("ladder"):
                continue
            named = {implementation: label for label, implementation in variants(op, device)}
            climbed = replace(settings, implementations=tuple(named), memory=False)
            with precision(item.dtype), device.context():
                problem = Problem(layer, settings.batch, item.dtype, item.layout, device)
                row.update(run.row_of(problem, direction, timing, climbed))
            row["labels"] = named
            results.add("ladder", row)
            yield {"line": "\n".join(_lines(row))}

    return len(todo), measured()


def _lines(row: dict) -> list[str]:
    first = next(iter(row["times"].values()))["seconds"][0] if row["times"] else 0.0
    lines = [f"{row['op']} {row['pass']}, {row['network']}/{row['layer']} {row['words']}"]
    for name, times in row["times"].items():
        seconds = times["seconds"][0]
        lines.append(f"  {row['labels'][name]:32} {report.duration(seconds):>10}  {first / seconds:8.1f}×")
    return lines


def table(rows: list[dict]) -> str:
    return "\n".join(line for row in rows for line in _lines(row))
