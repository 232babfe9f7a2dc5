"""`cuda_cnn.explain(model, x)`: what runs a network's layers, and why. Also `cuda-cnn explain MODEL`."""

from __future__ import annotations

import argparse
import contextlib
import html
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_cnn import _aten, override
from cuda_cnn.convert import DTYPES, convert, why_left
from cuda_cnn.fuse import watched
from cuda_cnn.ops import conv2d

__all__ = ["Explanation", "Row", "explain"]

ALGORITHMS = {
    "winograd": "3×3 to 5×5 of stride 1, or a stem: Winograd's minimal filtering",
    "depthwise": "a filter for each channel: nothing to share between channels",
    "gemm_nchw": "matrix products on planes: 1×1 or few channels, NCHW as it lies",
    "few_pixels": "a fully connected layer, or nearly: the weight is read once, where it lies",
    "few_channels": "few input channels: the tile of a matrix product would be mostly empty",
    "gemm": "matrix products on channels, the general case",
    "reference": "a plain loop: nothing faster computes this",
    # CUDA: csrc/cuda/conv2d/plan.h
    "product": "an implicit matrix product, the general case; tile, and how its operands are loaded",
    "direct": "the formula, one thread a result: nothing faster computes this",
}
# The other operators have a kernel for each of the two layouts, concat one, and the passes of `fuse` are NHWC.
LAYOUTS = {
    "channels": "NHWC: neighbouring lanes take neighbouring channels",
    "planes": "NCHW: neighbouring lanes take neighbouring pixels",
    "copies": "rows of the result, from front to back",
}
# What runs forward, of PyTorch's operators that have a counterpart here.
TORCH_OPERATORS = {
    o.name.split(".")[0]: o.operator for o in _aten.OVERRIDES if "backward" not in o.name and o.logged
}
TORCH_OPERATORS["cudnn_batch_norm"] = "batch_norm"


@dataclass(frozen=True)
class Row:
    """One call of an operator."""

    layer: str  # its name in the network; "" is the network itself
    operator: str
    ours: bool
    input: tuple[int, ...]
    output: tuple[int, ...]
    dtype: str
    layout: str  # of the input in memory: NHWC (channels_last), NCHW (contiguous), …
    algorithm: str  # or kernel; of a convolution: y / dx / dw
    reason: str  # of the algorithm, and what fuse has made of the layer; or why PyTorch's kernel runs
    conversions: tuple[str, ...]  # copies that the call paid for
    converted_bytes: int


@dataclass
class Explanation:
    """The rows; `print` shows a table, a notebook too, `html()` is a page, `data()` is for json."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            "layer",
            "operator",
            "by",
            "input",
            "output",
            "dtype",
            "layout",
            "algorithm y/dx/dw",
            "why",
            "copies",
        )
        table = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        ours = sum(row.ours for row in self.rows)
        copied = sum(row.converted_bytes for row in self.rows)
        return f"{ours} calls on these kernels, {len(self.rows) - ours} on PyTorch's; {_size(copied)} copied on the way"

    def data(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def html(self) -> str:
        head = "".join(
            f"<th>{name}" for name in ("layer", "operator", "by", "input", "output", "dtype", "layout")
        )
        head += "<th>algorithm y/dx/dw<th>why<th>copies"
        rows = [
            f'<tr class="{"ours" if row.ours else "torch"}">'
            + "".join(f"<td>{html.escape(c)}" for c in _cells(row))
            for row in self.rows
        ]
        style = "td,th{padding:.2em .7em;text-align:left}.torch{background:#fdd}table{font:14px sans-serif}"
        title = f"<caption>{html.escape(self.summary())}</caption>"
        return f"<style>{style}</style>\n<table>{title}\n<tr>{head}\n" + "\n".join(rows) + "\n</table>\n"

    _repr_html_ = html


def explain(model: Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs a network once and tells, for each call of an operator that this library has, what served it and why.

    Converted layers, the networks of the zoo, and layers of PyTorch are all seen, functions called outside a layer
    too; inside `cuda_cnn.use` what it serves counts as ours. The network runs without gradients in the mode that it
    is in; its buffers and the random numbers are put back.

    Args:
        model: any network.
        inputs, kwargs: what it takes.

    Returns:
        Explanation: rows in the order of the calls.

    Raises:
        TypeError: model is no torch.nn.Module. Whatever the network raises.
    """
    if not isinstance(model, Module):
        raise TypeError(f"explain: expected model to be a torch.nn.Module, got {type(model).__name__}")
    watcher = _Watcher()
    fused = watched(model, watcher.fused_layer)
    with _untouched(model), fused, watcher.layers_of(model), torch.no_grad(), watcher:
        model(*inputs, **kwargs)
    return Explanation(watcher.rows)


class _Watcher(TorchDispatchMode):
    """Writes a row for each operator of ours, and for each of PyTorch's that has a counterpart here."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.stack: list[tuple[str, Module | None]] = []
        self.casts: list[tuple[str, int]] = []
        self.fused = ""  # what fuse has made of the layer that is running

    @contextlib.contextmanager
    def fused_layer(self, name: str, what: str) -> Iterator[None]:
        self.stack.append((name, None))
        self.fused = what
        try:
            yield
        finally:
            self.stack.pop()
            self.fused = ""

    @contextlib.contextmanager
    def layers_of(self, model: Module) -> Iterator[None]:
        """The stack of layers that are running."""
        handles = []
        for name, module in model.named_modules():
            enter = _pushing(self.stack, name)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: Module, args: tuple, output: Any) -> None:
        # torch has no operator for it. output is None after an exception.
        if type(module) is torch.nn.LocalResponseNorm and output is not None and override.active() is None:
            self._add("local_response_norm", False, args[0], output, why_left(module) or "")
        self.stack.pop()
        self.casts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        space, name = func.namespace, func._schema.name.split("::")[1]
        if space == "aten" and name in TORCH_OPERATORS:
            return self._torch_call(func, TORCH_OPERATORS[name], args, kwargs or {})
        output = func(*args, **(kwargs or {}))
        if name == "_to_copy" and output.dtype != args[0].dtype:
            self.casts.append((f"{_short(args[0].dtype)}→{_short(output.dtype)}", _bytes(output)))
        elif space == "cuda_cnn" and name not in ("conv2d_algorithm", "conv2d_cuda_kernel", "conv2d_pack"):
            if name == "conv2d_packed_":  # into a dense block's buffer
                name, (output, *args) = "conv2d_packed", args
            if name == "conv2d_packed":  # the same call, of weights that inference has packed before
                x, weight, _, *rest = args
                name, args = "conv2d_fused", (x, weight, *rest[:6], False, *rest[6:])
            x = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            y = output[0] if isinstance(output, (list, tuple)) else output
            y = x if y is None else y
            algorithm, reason = _algorithm(name, args, y)
            reason = "; ".join(filter(None, (self.fused, reason)))
            self._add(name, True, x, y, reason, algorithm, _copies(name, args, y))
        return output

    def _torch_call(self, func: Any, operator: str, args: tuple, kwargs: dict) -> Any:
        scope, reason, ours = override.active(), None, False
        if scope is None:
            output = func(*args, **kwargs)
            layer = self.stack[-1][1] if self.stack else None
            reason = (
                layer and why_left(layer)
            ) or f"{func._schema.name} called as a function: cuda_cnn.use serves it"
        else:
            with override.use(scope.ops, fallback=scope.fallback) as log:
                output = func(*args, **kwargs)
            call = next(iter(log.counts), None)
            ours = call is not None and call.ours
            reason = call.reason if call else f"{operator} is excluded"
        x = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        y = output[0] if isinstance(output, (list, tuple)) else output
        algorithm = ""
        if ours:  # aten::convolution has transposed and output_padding before groups
            algorithm, reason = _algorithm(operator, [*args[:6], *args[8:9]], y)
        self._add(operator, ours, x, y, reason, algorithm, _copies(operator, args, y) if ours else ())
        return output

    def _add(
        self,
        operator: str,
        ours: bool,
        x: Tensor,
        y: Tensor,
        reason: str,
        algorithm: str = "",
        copies: Any = (),
    ) -> None:
        copies = [*self.casts, *copies] if ours else []
        self.casts.clear()
        layer = self.stack[-1][0] if self.stack else ""
        words, sizes = tuple(c[0] for c in copies), sum(c[1] for c in copies)
        shapes, dtype = (tuple(x.shape), tuple(y.shape)), _short(x.dtype)
        self.rows.append(
            Row(layer, operator, ours, *shapes, dtype, _layout(x), algorithm, reason, words, sizes)
        )


def _pushing(stack: list, name: str) -> Callable:
    return lambda module, args: stack.append((name, module))


@contextlib.contextmanager
def _untouched(model: Module) -> Iterator[None]:
    """Buffers and random numbers as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before:
                    buffer.copy_(values)


def _algorithm(operator: str, args: Any, y: Tensor) -> tuple[str, str]:
    """(name, reason) of what serves a call; of a convolution y / dx / dw, and the reason of the first."""
    if operator not in ("conv2d", "conv2d_fused"):
        last = torch._prims_common.suggest_memory_format(y) == torch.channels_last
        always_last = operator.startswith("channel_")
        name = "copies" if operator == "concat" else "channels" if last or always_last else "planes"
        return name, LAYOUTS[name]
    x, weight, *_ = args
    *geometry, groups = args[3:7] if operator == "conv2d" else args[9:13]
    mapped = operator == "conv2d_fused" and (args[3] is not None or args[5])
    lists = [list(v) * (2 // len(v)) for v in geometry]
    names = [
        conv2d.algorithm(
            *(direction, x.shape, weight.shape, *lists, groups, x.dtype, x.device.type),
            mapped=mapped and direction != "input_grad",
            nchw=operator == "conv2d" and all(t.is_contiguous() for t in (x, weight, y)),
        )
        for direction in ("forward", "input_grad", "weight_grad")
    ]
    return "/".join(names), ALGORITHMS.get(names[0].split()[0], "")


def _copies(operator: str, args: Any, y: Tensor | None) -> list[tuple[str, int]]:
    """Changes of memory layout that csrc/ops makes before and after the kernel."""
    if operator in ("conv2d", "conv2d_fused"):
        if y is not None and _algorithm(operator, args, y)[0].startswith("gemm_nchw"):
            return []
        parts = [("input to NHWC", args[0]), ("weight to NHWC", args[1]), ("output to NCHW", y)]
        return [(what, _bytes(t)) for what, t in parts if t.numel() and not _channels_together(t)]
    if operator == "concat" or not isinstance(args[0], Tensor):
        return []
    x = args[0]
    format = torch._prims_common.suggest_memory_format(x)
    return [] if x.is_contiguous(memory_format=format) else [("input made dense", _bytes(x))]


def _channels_together(t: Tensor) -> bool:
    """Dense NHWC, or some channels of a wider NHWC tensor."""
    (_, c, h, w), s = t.shape, t.stride()
    slice_of_wider = s[1] == 1 and s[3] >= c and s[2] == w * s[3] and s[0] == h * s[2]
    return t.is_contiguous(memory_format=torch.channels_last) or slice_of_wider


def _layout(t: Tensor) -> str:
    if t.dim() != 4:
        return "contiguous" if t.is_contiguous() else "strided"
    dense, last = t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)
    if dense and last:
        return "both"
    return "NCHW" if dense else "NHWC" if last else "NHWC slice" if _channels_together(t) else "strided"


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _cells(row: Row) -> tuple[str, ...]:
    shapes = ("×".join(map(str, shape)) for shape in (row.input, row.output))
    by = "ours" if row.ours else "PyTorch"
    copies = ", ".join(row.conversions)
    name = row.layer or "(network)"
    return (name, row.operator, by, *shapes, row.dtype, row.layout, row.algorithm, row.reason, copies)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="what runs each layer of a network, and why",
        description="MODEL is a network of this library, or torchvision:NAME or timm:NAME, which is converted first.",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--input", metavar="NxCxHxW", help="default: one picture of the network's own size")
    parser.add_argument("--dtype", default="float32", choices=[_short(d) for d in DTYPES])
    parser.add_argument("--nchw", action="store_true", help="contiguous input and weights, not channels_last")
    parser.add_argument("--no-convert", action="store_true", help="a foreign network as it is")
    parser.add_argument("--html", metavar="FILE", help="write a page")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    model, size = _network(args.model, not args.no_convert)
    if args.input:
        size = _parse_size(args.input)
    format = torch.contiguous_format if args.nchw else torch.channels_last
    model = model.eval().to(dtype=getattr(torch, args.dtype), memory_format=format)
    x = torch.zeros(size, dtype=getattr(torch, args.dtype)).to(memory_format=format)
    explanation = explain(model, x)
    if args.html:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(f"<!doctype html><meta charset=utf-8><title>{html.escape(args.model)}</title>\n")
            file.write(explanation.html())
    print(json.dumps(explanation.data(), indent=1) if args.json else explanation)


def _network(name: str, converted: bool) -> tuple[Module, tuple[int, ...]]:
    library, colon, own = name.partition(":")
    if not colon:
        from cuda_cnn.models import create_model

        model = create_model(name)
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        return model, (1, first.in_channels, model.input_size, model.input_size)
    if library == "torchvision":
        import torchvision

        model = torchvision.models.get_model(own, weights=None)
    elif library == "timm":
        import timm

        model = timm.create_model(own)
    else:
        raise ValueError(f"explain: expected NAME, torchvision:NAME or timm:NAME, got {name!r}")
    if converted:
        convert(model)
    return model, (1, 3, 224, 224)


def _parse_size(text: str) -> tuple[int, ...]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise ValueError(f"explain: expected --input NxCxHxW, for example 1x3x224x224, got {text!r}")
    return tuple(map(int, parts))
