"""What a layer's call has to do at least: floating-point operations and bytes.

FLOPs are those of the direct convolution, 2·N·K·P·Q·(C/G)·R·S for the forward pass and for each of the two
gradients, whatever the algorithm (Winograd's rate may therefore pass the machine's peak). Other operators are bound
by memory and count no FLOPs, as in `torch.utils.flop_counter`.

Bytes are compulsory traffic: each tensor that the pass reads or gives, once.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from .shapes import Layer

__all__ = ["PASSES", "Work", "operand_shapes", "output_shape", "passes", "work"]

PASSES = ("forward", "dgrad", "wgrad", "full")
Shape = tuple[int, ...]


class Work(NamedTuple):
    flops: int
    bytes: int


def passes(op: str) -> tuple[str, ...]:
    """forward; dgrad: the gradient of the input, with the parameters' where one kernel gives both; wgrad: of the
    weights; full: forward and every gradient."""
    return PASSES if op == "conv2d" else ("forward", "dgrad", "full")


def operand_shapes(layer: Layer, batch: int) -> list[Shape]:
    """Shapes of the tensors that the operator takes: the input, then parameters (concat: further inputs)."""
    c, h, w = layer.shape
    a, x = layer.args, (batch, *layer.shape)
    if layer.op == "conv2d":
        weight = (a["filters"], c // a["groups"], a["size"], a["size"])
        return [x, weight, *([(a["filters"],)] if a["bias"] else [])]
    if layer.op == "concat":
        return [x, *((batch, other, h, w) for other in a["others"])]
    return [x, (c,), (c,)] if layer.op in ("batch_norm", "subsample") else [x]


def output_shape(layer: Layer, batch: int) -> Shape:
    c, h, w = layer.shape
    a = layer.args
    if layer.op == "conv2d":
        return (batch, a["filters"], *(_windows(n, a) for n in (h, w)))
    if layer.op == "max_pool2d":
        return (batch, c, *(_windows(n, a) for n in (h, w)))
    if layer.op == "concat":
        return (batch, c + sum(a["others"]), h, w)
    return (batch, c, h // 2, w // 2) if layer.op == "subsample" else (batch, c, h, w)


def _windows(extent: int, a: dict) -> int:
    """⌊(H + 2·padding − size) / stride⌋ + 1; with ceil_mode ⌈…⌉ + 1, less a window that would start in the padding."""
    room = extent + 2 * a["padding"] - a["size"]
    if not a.get("ceil_mode"):
        return room // a["stride"] + 1
    count = -(-room // a["stride"]) + 1
    return count - 1 if (count - 1) * a["stride"] >= extent + a["padding"] else count


def work(layer: Layer, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Raises ValueError for a pass that the operator does not have."""
    if direction not in passes(layer.op):
        raise ValueError(f"{layer.op} has no pass {direction!r}: {', '.join(passes(layer.op))}")
    x, *others = (prod(shape) for shape in operand_shapes(layer, batch))
    y = prod(output_shape(layer, batch))
    elements = _elements(layer, direction, x, others, y)
    flops = 0
    if layer.op == "conv2d":
        a = layer.args
        once = 2 * y * (layer.shape[0] // a["groups"]) * a["size"] ** 2
        flops = 3 * once if direction == "full" else once
    return Work(flops, elements * dtype.itemsize)


def _elements(layer: Layer, direction: str, x: int, others: list[int], y: int) -> int:
    parameters = sum(others)
    forward = x + parameters + y
    if layer.op == "conv2d":
        weight = others[0]
        # Gradients are written once, whatever they are of; the output's gradient is read by each.
        return {
            "forward": forward,
            "dgrad": y + weight + x,
            "wgrad": y + x + weight,
            "full": forward + (y + weight + x) + (y + x + weight) + sum(others[1:]),
        }[direction]
    if layer.op == "concat":
        backward = y + x + parameters
    elif layer.op == "max_pool2d":
        backward = y + x
    else:  # reads dy, x and the parameters, gives dx and the parameters' gradients
        backward = y + 2 * x + 2 * parameters
    return {"forward": forward, "dgrad": backward, "full": forward + backward}[direction]
