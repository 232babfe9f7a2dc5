"""A network of the zoo in its forms: plain torch.nn, compiled, on this library's layers, fused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from ..convert import revert
from ..models.densenet import DenseBlock
from ..models.lenet import TableConv2d
from .cases import UnavailableError
from .rivals import compile_options

__all__ = ["FORMS", "build", "outputs_of", "plain"]

FORMS = ("torch", "compile", "cuda_cnn", "fused")


class _TableConv2d(TableConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return TF.conv2d(x, self.dense_weight(), self.bias)


class _DenseBlock(DenseBlock):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x


# What has no layer of torch.nn to go back to: networks' own modules that call an operator.
_TWINS = {TableConv2d: _TableConv2d, DenseBlock: _DenseBlock}


def plain(model: nn.Module) -> nn.Module:
    """A copy on torch.nn's own layers, with the same parameters' values; no operator of this library is left."""
    model = copy.deepcopy(model)
    revert(model)
    for module in model.modules():
        module.__class__ = _TWINS.get(type(module), type(module))
    return model


def build(form: str, model: nn.Module, training: bool, device: str = "cpu") -> Callable[[Tensor], object]:
    """The network as a callable, with weights of its own. Raises UnavailableError for a form that is not to be had."""
    if form == "torch":
        return plain(model)
    if form == "cuda_cnn":
        return copy.deepcopy(model)
    if form in ("compile", "compile:max-autotune"):
        torch._dynamo.reset()
        frozen = device == "cpu" and not training
        return torch.compile(plain(model), options=compile_options(device, frozen, form != "compile"))
    if form in ("fused", "fused:recompute"):
        if importlib.util.find_spec("cuda_cnn.fuse") is None:
            raise UnavailableError("cuda_cnn.fuse is not available in this version")
        from cuda_cnn.fuse import fuse

        if form != "fused" and not training:
            raise UnavailableError("in inference nothing is kept that could be recomputed")
        network = copy.deepcopy(model)
        fuse(network, recompute=form != "fused")
        return network
    raise ValueError(f"unknown form {form!r}: {', '.join(FORMS)}")


def outputs_of(y: object) -> list[Tensor]:
    """The tensors of a network's answer: GoogLeNet gives three in training."""
    return [y] if isinstance(y, Tensor) else [t for t in y if t is not None]
