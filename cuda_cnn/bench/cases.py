"""A layer as two calls on the same tensors, ours and torch's, verified against float64 before timing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as TF

from .. import functional as F
from .shapes import Layer

__all__ = ["Case", "WrongResultError", "build", "vendor"]

# Largest error over largest value: rounding of long sums stays well below, a wrong tap is far above.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class WrongResultError(RuntimeError):
    """An output that is not the operator's: it is not timed."""


@dataclass(frozen=True)
class Case:
    """Two rivals on the same inputs; an error is the largest one against float64 over the largest value."""

    ours: Callable[[], object]
    rival: Callable[[], object]
    ours_error: float
    rival_error: float


def _subsample(x: Tensor, coefficient: Tensor, bias: Tensor) -> Tensor:
    a = TF.avg_pool2d(x, 2, divisor_override=1) * coefficient[:, None, None] + bias[:, None, None]
    return 1.7159 * torch.tanh(2 / 3 * a)


TORCH = SimpleNamespace(
    conv2d=TF.conv2d,
    max_pool2d=TF.max_pool2d,
    local_response_norm=TF.local_response_norm,
    batch_norm=TF.batch_norm,
    concat=torch.cat,
    subsample=_subsample,
)

# operator: shapes of the tensors besides the input, and the call with either library.
_CALLS: dict[str, tuple[Callable, Callable]] = {
    "conv2d": (
        lambda c, a: [(a["filters"], c // a["groups"], a["size"], a["size"]), (a["filters"],)],
        lambda lib, a, x, w, b: lib.conv2d(x, w, b, a["stride"], a["padding"], 1, a["groups"]),
    ),
    "max_pool2d": (
        lambda c, a: [],
        lambda lib, a, x: lib.max_pool2d(x, a["size"], a["stride"], a["padding"]),
    ),
    "local_response_norm": (
        lambda c, a: [],
        lambda lib, a, x: lib.local_response_norm(x, a["size"], a["alpha"], 0.75, a["k"]),
    ),
    "batch_norm": (
        lambda c, a: [(c,), (c,)],
        lambda lib, a, x, w, b: lib.batch_norm(x, None, None, w, b, True),
    ),
    "concat": (
        lambda c, a: [(None, a["grown"], None, None)],
        lambda lib, a, *tensors: lib.concat(list(tensors), 1),
    ),
    "subsample": (lambda c, a: [(c,), (c,)], lambda lib, a, x, w, b: lib.subsample(x, w, b)),
}


def build(layer: Layer, batch: int, backward: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    """The layer on random data in channels_last, forward, or forward and all gradients.

    Raises WrongResultError where our output is off by more than rounding.
    """
    inputs = _inputs(layer, batch)
    _, call = _CALLS[layer.op]
    exact = _outputs(TORCH, layer, inputs, backward)
    tensors = [t.to(dtype).requires_grad_(backward) for t in inputs]
    errors = [_error(_outputs(lib, layer, tensors, backward), exact) for lib in (F, TORCH)]
    if not errors[0] <= TOLERANCE[dtype]:
        raise WrongResultError(
            f"{layer}: error {errors[0]:.1e} against float64, expected at most {TOLERANCE[dtype]:.0e}"
        )
    if backward:
        gradient = torch.randn_like(call(TORCH, layer.args, *tensors))

        def run(lib) -> object:
            return torch.autograd.grad(call(lib, layer.args, *tensors), tensors, gradient)
    else:

        def run(lib) -> object:
            with torch.no_grad():
                return call(lib, layer.args, *tensors)

    return Case(lambda: run(F), lambda: run(TORCH), *errors)


def vendor(op: str) -> str:
    """Whose kernel torch runs for `op` on the CPU."""
    if op == "conv2d" and torch.backends.mkldnn.is_available():
        version = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
        return f"oneDNN {version[1]}" if version else "oneDNN"
    return "ATen"


def _inputs(layer: Layer, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    c, h, w = layer.shape
    others, _ = _CALLS[layer.op]
    shapes = [(batch, c, h, w), *others(c, layer.args)]
    shapes = [tuple(d if d is not None else (batch, c, h, w)[i] for i, d in enumerate(s)) for s in shapes]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float32).double() for s in shapes]
    if layer.op == "conv2d":
        tensors[1] = tensors[1] / (tensors[1][0].numel() ** 0.5)
    # Rounded to bfloat16, so that every dtype starts from the same numbers.
    return [_channels_last(t.bfloat16().double()) for t in tensors]


def _outputs(lib, layer: Layer, tensors: list[Tensor], backward: bool) -> list[Tensor]:
    _, call = _CALLS[layer.op]
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    y = call(lib, layer.args, *leaves)
    if not backward:
        return [y]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    scaled = [
        ((f.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for f, e in zip(found, exact)
    ]
    return max(scaled)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
