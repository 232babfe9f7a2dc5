"""The layers of the classic networks, as the benchmarks run them: `layers("vgg16", op="conv2d")`.

A network of the zoo is run on tensors without data, in training and in evaluation, and every call of one of
this library's operators is noted: the lists are the networks' own and cannot fall behind. Equal layers of one
network are listed once, with their number. Sizes are those of the papers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .. import functional as F
from ..models.registry import create_model, nearest

__all__ = ["NETWORKS", "OPERATORS", "Layer", "input_size", "layers", "short_name", "trace"]

NETWORKS = ("lenet5", "alexnet", "vgg16", "resnet50", "densenet121", "googlenet")


@dataclass(frozen=True)
class Layer:
    """One layer: operator, input (C, H, W), the operator's arguments, and how often the network has it."""

    network: str
    name: str
    op: str
    shape: tuple[int, int, int]
    args: dict = field(default_factory=dict, hash=False)
    count: int = 1

    def __str__(self) -> str:
        c, h, w = self.shape
        return f"{self.network}/{self.name} {c}×{h}×{w}{words(self)}"


def words(layer: Layer) -> str:
    """What the operator does beside its input's shape: ` → 64 3×3/2`."""
    a = layer.args
    if layer.op == "conv2d":
        groups = f" g{a['groups']}" if a["groups"] > 1 else ""
        return f" → {a['filters']} {a['size']}×{a['size']}/{a['stride']}{groups}"
    if layer.op == "concat":
        return " + " + " + ".join(map(str, a["others"]))
    return f" {a['size']}/{a['stride']}" if layer.op == "max_pool2d" else ""


def short_name(layer: Layer) -> str:
    return f"{layer.network}/{layer.name}"


def layers(network: str | None = None, op: str | None = None) -> list[Layer]:
    """Those of one network, of one operator, or all. Raises ValueError for an unknown name."""
    for what, name, known in (("network", network, NETWORKS), ("operator", op, OPERATORS)):
        if name is not None and name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}")
    found = [layer for n in NETWORKS if network in (None, n) for layer in trace(n)]
    return [layer for layer in found if op in (None, layer.op)]


# ---- What a call says -----------------------------------------------------------------------------------


def _one(value: int | Sequence[int]) -> int:
    """The number of a pair of equal ones: the papers' windows are square."""
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ValueError(f"expected a square window, got {value}")
    return values.pop()


def _conv2d(a: dict[str, Any]) -> dict[str, Any]:
    return {
        "filters": a["weight"].shape[0],
        "size": _one(a["weight"].shape[2:]),
        **{name: _one(a[name]) for name in ("stride", "padding", "groups")},
        "bias": a["bias"] is not None,
    }


def _max_pool2d(a: dict[str, Any]) -> dict[str, Any]:
    stride = a["kernel_size"] if a["stride"] is None else a["stride"]
    window = {"size": _one(a["kernel_size"]), "stride": _one(stride), "padding": _one(a["padding"])}
    return {**window, "ceil_mode": a["ceil_mode"]}


OPERATORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "local_response_norm": lambda a: {name: a[name] for name in ("size", "alpha", "beta", "k")},
    "batch_norm": lambda a: {"training": a["training"]},
    "concat": lambda a: {"others": tuple(t.shape[1] for t in a["tensors"][1:])},
    "subsample": lambda a: {},
}
_SIGNATURES = {name: inspect.signature(getattr(F, name)) for name in OPERATORS}


# ---- The networks' own calls ------------------------------------------------------------------------------


class _Notes(TorchFunctionMode):
    """Notes every call of the operators, under the name of the module that makes it."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network, self.path, self.seen = network, [], {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in OPERATORS and function is getattr(F, name):
            bound = _SIGNATURES[name].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.note(name, bound.arguments)
        return function(*args, **(kwargs or {}))

    def note(self, op: str, arguments: dict[str, Any]) -> None:
        first = next(iter(arguments.values()))
        x = first[0] if op == "concat" else first
        args = OPERATORS[op](arguments)
        key = (op, *x.shape[1:], *args.values())
        known = self.seen.get(key)
        layer = known or Layer(self.network, self.path[-1], op, tuple(x.shape[1:]), args, 0)
        self.seen[key] = replace(layer, count=layer.count + 1)

    def watch(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, x, name=name: self.path.append(name))
            module.register_forward_hook(lambda m, x, y: self.path.pop() and None)


@functools.cache
def trace(network: str) -> tuple[Layer, ...]:
    """The distinct layers of one training step, in the order of the first call."""
    notes = _Notes(network)
    with FakeTensorMode():  # no plain tensor: DenseNet shows its concatenations
        model = create_model(network)
        notes.watch(model)
        with notes:
            model(torch.empty(2, *_size(model)))
    return tuple(notes.seen.values())


@functools.cache
def input_size(network: str) -> tuple[int, int, int]:
    """(C, H, W) of a picture, as the paper has it."""
    with torch.device("meta"):
        return _size(create_model(network))


def _size(model: torch.nn.Module) -> tuple[int, int, int]:
    channels = next(m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    return channels, model.input_size, model.input_size
