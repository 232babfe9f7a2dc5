"""Where a step's time goes, by layer and operator, from torch's profiler.

Each module's forward is a named range. A range's own time, less that of the modules inside, is the layer's; a
backward node belongs to the layer whose forward call has its sequence number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .devices import profiler

__all__ = ["LayerTime", "StepTimes", "profile_step"]

_PREFIX = "layer: "
_NODE = "autograd::engine::evaluate_function: "
OTHER = "other"
# A module's class: what its time is called.
KINDS = {
    "Conv2d": "convolution",
    "TableConv2d": "convolution",
    "BatchNorm2d": "batch_norm",
    "MaxPool2d": "max_pool",
    "AvgPool2d": "average pool",
    "AdaptiveAvgPool2d": "average pool",
    "LocalResponseNorm": "local_response_norm",
    "Linear": "linear",
    "ReLU": "relu",
    "Concat": "concat",
    "DenseBlock": "concat",
    "Subsample2d": "subsample",
    "Dropout": "dropout",
}


# What an operator's name contains: what its own time is called, where no layer is left to tell.
OPERATOR_KINDS = (
    *(("conv", "convolution"), ("batch_norm", "batch_norm"), ("max_pool", "max_pool")),
    *(("local_response_norm", "local_response_norm"), ("concat", "concat"), ("aten::cat", "concat")),
    *(("write_channels", "concat"), ("addmm", "linear"), ("aten::mm", "linear"), ("linear", "linear")),
    *(("relu", "relu"), ("clamp", "relu"), ("threshold", "relu"), ("avg_pool", "average pool")),
    *(("subsample", "subsample"), ("ompiled", "compiled"), ("graph_", "compiled")),
)


@dataclass
class LayerTime:
    """Seconds of one step."""

    name: str
    kind: str
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass
class StepTimes:
    """layers: in the order of the first call. operators: name, seconds (self), calls; the longest first."""

    layers: list[LayerTime] = field(default_factory=list)
    operators: list[tuple[str, float, int]] = field(default_factory=list)
    total: float = 0.0

    def by_kind(self) -> dict[str, float]:
        """Of the layers, or, where none were named, of the operators."""
        found: dict[str, float] = {}
        for layer in self.layers:
            found[layer.kind] = found.get(layer.kind, 0.0) + layer.total
        for name, seconds, _ in () if self.layers else self.operators:
            kind = next((kind for part, kind in OPERATOR_KINDS if part in name), OTHER)
            found[kind] = found.get(kind, 0.0) + seconds
        found[OTHER] = found.get(OTHER, 0.0) + max(0.0, self.total - sum(found.values()))
        return found


def profile_step(
    model: nn.Module,
    step: Callable[[], object],
    steps: int = 3,
    trace: Path | None = None,
    cuda: bool = False,
) -> StepTimes:
    """Means over `steps` of step(), which runs the model; a first one is not counted. trace: a Chrome trace's file."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with _named_ranges(model) if model is not None else contextlib.nullcontext():
        step()
        with profiler(activities=activities) as seen:
            for _ in range(steps):
                with torch.profiler.record_function("step"):
                    step()
                    if cuda:
                        torch.cuda.synchronize()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    return _read(list(seen.events()), _kinds(model) if model is not None else {}, steps, cuda)


def _kinds(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        base = next(
            (c.__name__.lstrip("_") for c in type(module).__mro__ if c.__name__.lstrip("_") in KINDS), ""
        )
        found[name] = KINDS.get(base, OTHER)
    return found


@contextlib.contextmanager
def _named_ranges(model: nn.Module) -> Iterator[None]:
    open_ranges: list = []

    def enter(name: str) -> None:
        open_ranges.append(torch.profiler.record_function(_PREFIX + name))
        open_ranges[-1].__enter__()

    def leave() -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda m, x, y: leave()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(events: list, kinds: dict[str, str], steps: int, cuda: bool) -> StepTimes:
    def seconds(event) -> float:
        return 1e-6 * (event.device_time_total if cuda else event.cpu_time_total) / steps

    layers: dict[str, LayerTime] = {}
    owner: dict[int, str] = {}  # of a sequence number
    operators: dict[str, list[float]] = {}
    times = StepTimes()
    for event in events:
        if event.name == "step":
            times.total += 1e-6 * event.cpu_time_total / steps
        elif event.name.startswith(_PREFIX):
            name = event.name.removeprefix(_PREFIX)
            inside = sum(seconds(child) for child in _nested_layers(event))
            layer = layers.setdefault(name, LayerTime(name or "(network)", kinds[name]))
            layer.forward += seconds(event) - inside
        elif not event.name.startswith((_NODE, "ProfilerStep")) and not event.is_async:
            self_time = event.self_device_time_total if cuda else event.self_cpu_time_total
            total = operators.setdefault(event.name, [0.0, 0.0])
            total[0] += 1e-6 * self_time / steps
            total[1] += 1 / steps
        if event.sequence_nr >= 0 and not event.name.startswith(_NODE):
            inside_of = _layer_of(event)
            if inside_of is not None:
                owner.setdefault(event.sequence_nr, inside_of)
    for event in events:
        if event.name.startswith(_NODE) and event.sequence_nr in owner:
            layers[owner[event.sequence_nr]].backward += seconds(event)
    times.layers = [layer for layer in layers.values() if layer.total > 0]
    times.operators = sorted(((n, t, round(c)) for n, (t, c) in operators.items()), key=lambda row: -row[1])
    return times


def _nested_layers(event) -> Iterator:
    """The outermost layer ranges below this one."""
    for child in event.cpu_children:
        if child.name.startswith(_PREFIX):
            yield child
        else:
            yield from _nested_layers(child)


def _layer_of(event) -> str | None:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(_PREFIX):
        parent = parent.cpu_parent
    return None if parent is None else parent.name.removeprefix(_PREFIX)
