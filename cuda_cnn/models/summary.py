"""`cuda-cnn summary MODEL`: what each layer gives, costs and sees.

Shapes, parameters and receptive fields come from hooks on the layers, multiply-adds from
`torch.utils.flop_counter`. The network runs on the meta device: nothing is computed and no weight is stored.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cuda_cnn.nn import Subsample2d

from .densenet import DenseBlock
from .registry import create_model

__all__ = ["Layer", "Summary", "add_parser", "main", "summarize"]


class Sight(NamedTuple):
    """What one pixel of a map sees of the input, along one axis (Araujo et al., "Computing receptive fields",
    2019).

    field: pixels of the input that reach it. stride: input pixels between it and its neighbour.
    """

    field: float
    stride: float

    def through(self, kernel: int, stride: int, dilation: int) -> Sight:
        """After a window: r + (k − 1)·d·j and j·s."""
        return Sight(self.field + (kernel - 1) * dilation * self.stride, self.stride * stride)


_ALL = (Sight(math.inf, math.inf),) * 2


@dataclass
class Layer:
    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    activation_bytes: int
    sight: tuple[Sight, Sight]  # height, width; infinite behind the layer that reads all pixels


@dataclass
class Summary:
    model: str
    input: tuple[int, ...]
    layers: list[Layer] = field(default_factory=list)
    connections: dict[str, tuple[int, int]] = field(default_factory=dict)  # dense block: layers, connections

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        return sum(layer.activation_bytes for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "parameters", "multiply-adds", "activation", "sees", "stride")
        rows = [_cells(layer) for layer in self.layers]
        counts = (f"{self.parameters:,}", f"{self.multiply_adds:,}", _size(self.activation_bytes))
        table = _table([head, *rows, ("total", "", "", *counts, "", "")])
        lines = [f"{self.model}, input {_times(self.input)}", *table]
        for name, (layers, connections) in self.connections.items():
            lines.append(f"{name}: {layers} layers, L(L+1)/2 = {connections} connections")
        return "\n".join(lines)


def summarize(model: nn.Module, input_size: Iterable[int], *, name: str | None = None) -> Summary:
    """One row for each layer, in the order of the first call; a batch of one image of `input_size` (C, H, W).

    The model must live on the meta device (`with torch.device("meta"): …`). It is run in evaluation mode.
    multiply_adds counts convolutions and linear layers (a multiplication with its addition is one);
    activation_bytes are the layer's output, for one image. Where branches join, the widest field counts.
    """
    size = tuple(input_size)
    summary = Summary(name or type(model).__name__, size)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Sights() as sights:
        x = torch.empty(1, *size, device="meta")
        sights.see(x, (Sight(1, 1), Sight(1, 1)))
        hooks = _attach(model, summary, counter, sights)
        try:
            model.eval()(x)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
    for block_name, block in model.named_modules():
        if isinstance(block, DenseBlock):
            summary.connections[block_name] = (len(block), block.connections)
    return summary


def _attach(model: nn.Module, summary: Summary, counter: FlopCounterMode, sights: _Sights) -> list:
    hooks = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        if any(module.children()) or isinstance(module, nn.Identity):
            continue
        flops_before = [0]

        def before(_module, _inputs, flops_before=flops_before):
            flops_before[0] = counter.get_total_flops()

        def after(module, inputs, output, name=name, flops_before=flops_before):
            sight = sights.through(module, inputs[0], output)
            parameters = [p for p in module.parameters() if id(p) not in counted]
            counted.update(map(id, parameters))
            summary.layers.append(
                Layer(
                    name=name,
                    kind=_kind(module),
                    output=tuple(output.shape[1:]),
                    parameters=sum(p.numel() for p in parameters),
                    multiply_adds=(counter.get_total_flops() - flops_before[0]) // 2,
                    activation_bytes=output.nbytes,
                    sight=sight,
                )
            )

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return hooks


class _Sights(TorchDispatchMode):
    """Carries the Sight (height, width) of each tensor from the inputs of every operation to its results.

    A result sees what the widest of the inputs sees; windows are added by `through`, from the layer that has
    them. Sights belong to storages, so that views and writes in place count; all are kept, so that no address
    is used
    twice: on the meta device they are free.
    """

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[Sight, Sight]] = {}
        self.kept: list[Tensor] = []

    def see(self, tensor: Tensor, sight: tuple[Sight, Sight]) -> None:
        self.seen[tensor.untyped_storage()._cdata] = sight
        self.kept.append(tensor)

    def of(self, tensor: Tensor) -> tuple[Sight, Sight] | None:
        """None for what does not depend on the input. A flattened map sees all."""
        sight = self.seen.get(tensor.untyped_storage()._cdata)
        return _ALL if sight and tensor.dim() < 4 else sight

    def through(
        self, module: nn.Module, x: Tensor | list[Tensor], output: Tensor
    ) -> tuple[Sight, Sight] | None:
        sight = self.of(x) if isinstance(x, Tensor) else None
        if sight and isinstance(module, nn.AdaptiveAvgPool2d) and output.shape != x.shape:
            self.see(output, _ALL)
        elif sight and hasattr(module, "kernel_size"):
            axes = zip(sight, *_window(module), strict=True)
            self.see(output, tuple(s.through(*window) for s, *window in axes))
        return self.of(output)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sights = [self.of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        by_axis = list(zip(*(sight for sight in sights if sight), strict=True))
        written = [t for t, a in zip(args, func._schema.arguments, strict=False) if a.is_write]
        for output in [*tree_leaves(result), *written]:
            if by_axis and isinstance(output, Tensor):
                self.see(output, tuple(Sight(*map(max, zip(*axis, strict=True))) for axis in by_axis))
        return result


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _window(module: nn.Module) -> list[tuple[int, int]]:
    """Kernel size, stride and dilation, each as (height, width)."""
    kernel = _pair(module.kernel_size)
    stride = kernel if isinstance(module, Subsample2d) else _pair(getattr(module, "stride", 1))
    return [kernel, stride, _pair(getattr(module, "dilation", 1))]


def _kind(module: nn.Module) -> str:
    if not hasattr(module, "kernel_size"):
        return type(module).__name__
    kernel, stride, _ = _window(module)
    by = f"/{_times(sorted(set(stride)))}" if max(stride) > 1 else ""
    return f"{type(module).__name__} {_times(kernel)}{by}"


def _cells(layer: Layer) -> tuple[str, ...]:
    local = layer.sight and math.isfinite(layer.sight[0].field)
    sees = _times(s.field for s in layer.sight) if local else "all"
    stride = _times(sorted({s.stride for s in layer.sight})) if local else ""
    counts = (f"{count:,}" if count else "" for count in (layer.parameters, layer.multiply_adds))
    return (
        layer.name,
        layer.kind,
        _times(layer.output),
        *counts,
        _size(layer.activation_bytes),
        sees,
        stride,
    )


def _times(numbers: Iterable[int]) -> str:
    return "×".join(map(str, numbers))


def _size(count: int) -> str:
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(words + numbers).rstrip())
    return lines


def stack(kernels: Iterable[int], channels: int) -> nn.Sequential:
    """Convolutions one behind the other, of as many maps out as in, without biases (VGG, section 2.3)."""
    return nn.Sequential(*(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in kernels))


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "summary",
        help="layers of a network: shapes, parameters, multiply-adds, memory, receptive fields",
        description="MODEL is a network's name, or kernel sizes of stacked convolutions, such as 3+3+3.",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--input", metavar="CxHxW", help="default: the paper's")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for create_model"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    size = _parse_size(args.input) if args.input else None
    with torch.device("meta"):
        if args.model.replace("+", "").isdigit():
            size = size or (64, 56, 56)
            model = stack(map(int, args.model.split("+")), size[0])
        else:
            options = dict(map(_parse_option, args.option))
            if size:
                options.setdefault("in_chans", size[0])
            model = create_model(args.model, **options)
            size = size or _paper_size(model)
    print(summarize(model, size, name=args.model))


def _paper_size(model: nn.Module) -> tuple[int, int, int]:
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return (channels, model.input_size, model.input_size)


def _parse_size(text: str) -> tuple[int, ...]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"summary: expected --input CxHxW, for example 3x224x224, got {text!r}")
    return tuple(map(int, parts))


def _parse_option(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"summary: expected --option NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
