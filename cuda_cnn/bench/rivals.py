"""The libraries that a layer's call can go to, with the same arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from .. import functional as F
from .. import reference
from .shapes import Layer

__all__ = ["LIBRARIES", "TORCH", "apply", "compile_options", "compiled", "data_operands", "vendor"]


def _subsample(x: Tensor, coefficient: Tensor, bias: Tensor, *_: Any) -> Tensor:
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
LIBRARIES = {"cuda_cnn": F, "torch": TORCH, "reference": reference}

_CALLS: dict[str, Callable] = {
    "conv2d": lambda lib, a, x, w, b=None: lib.conv2d(
        x, w, b, (a["stride"],) * 2, (a["padding"],) * 2, (1, 1), a["groups"]
    ),
    "max_pool2d": lambda lib, a, x: lib.max_pool2d(
        x, a["size"], a["stride"], a["padding"], 1, a["ceil_mode"]
    ),
    "local_response_norm": lambda lib, a, x: lib.local_response_norm(
        x, a["size"], a["alpha"], a["beta"], a["k"]
    ),
    "batch_norm": lambda lib, a, x, w, b: lib.batch_norm(x, None, None, w, b, True),
    "concat": lambda lib, a, *tensors: lib.concat(list(tensors), 1),
    "subsample": lambda lib, a, x, w, b: lib.subsample(x, w, b),
}


def apply(library: Any, layer: Layer, tensors: list[Tensor]) -> Tensor:
    return _CALLS[layer.op](library, layer.args, *tensors)


def data_operands(layer: Layer, operands: int) -> int:
    """How many of the operands are data; those behind are parameters."""
    return operands if layer.op == "concat" else 1


class _TorchLayer(nn.Module):
    """The layer with its parameters inside, where torch.compile may fold and pack them."""

    def __init__(self, layer: Layer, parameters: list[Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.values = nn.ParameterList([nn.Parameter(p, requires_grad=p.requires_grad) for p in parameters])

    def forward(self, *data: Tensor) -> Tensor:
        return apply(TORCH, self.layer, [*data, *self.values])


def compiled(
    layer: Layer, tensors: list[Tensor], device: str, frozen: bool, tuned: bool
) -> Callable[[], Tensor]:
    """torch.compile's own kernel for the layer. frozen: as inference on a CPU may have it, with weights packed."""
    torch._dynamo.reset()  # else the ninth layer would quietly be run by eager code
    data = data_operands(layer, len(tensors))
    if frozen:
        module = _TorchLayer(layer, tensors[data:]).eval()
        run = torch.compile(module, fullgraph=True, options=compile_options(device, True, tuned))
        return lambda: run(*tensors[:data])
    options = compile_options(device, False, tuned)
    function = torch.compile(lambda *t: apply(TORCH, layer, list(t)), fullgraph=True, options=options)
    return lambda: function(*tensors)


def compile_options(device: str, frozen: bool, tuned: bool) -> dict[str, bool]:
    """Of torch.compile. A GPU is always tuned; graphs are --timing graph's, for all rivals. On a CPU tuning compiles
    every candidate for each matrix product, which takes minutes a network: `compile:max-autotune` asks for it."""
    return {"max_autotune": tuned or device == "cuda", "freezing": frozen, "triton.cudagraphs": False}


def vendor(op: str, device: str = "cpu") -> str:
    """Whose kernel torch runs for `op`."""
    if device == "cuda":
        version = torch.backends.cudnn.version()
        return f"cuDNN {version}" if op in ("conv2d", "batch_norm") and version else "ATen"
    if op == "conv2d" and torch.backends.mkldnn.is_available():
        version = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
        return f"oneDNN {version[1]}" if version else "oneDNN"
    return "ATen"
