"""Networks that exist already, on these kernels and back: :func:`convert` and :func:`revert`.

Both change nothing but the class of a layer. The object, its parameters, buffers, hooks, state_dict and training
flag stay, and so does everything that refers to them: an optimiser, DistributedDataParallel, a checkpoint. Nothing is
remembered outside the network, so that a copy, a pickle or a loaded network can be reverted as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.pooling import _MaxPoolNd
from torch.nn.utils.parametrize import is_parametrized

from cuda_cnn import _C, nn

__all__ = ["ConversionReport", "LayerChange", "LayerLeft", "convert", "register_torch_form", "revert"]

Filter = Callable[[Module, str], bool]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# torch's layer ↔ ours, and the operator that ours runs on.
_OURS: dict[type, type] = {}
_TORCH: dict[type, type] = {}
_OPERATOR: dict[type, str] = {}


def register_torch_form(torch_form: type, ours: type, operator: str) -> None:
    """Makes `convert` turn layers of class torch_form into ours, and `revert` the other way.

    Both classes must keep the same attributes, parameters and buffers: only the class of the object changes.
    """
    _OURS[torch_form], _TORCH[ours] = ours, torch_form
    _OPERATOR[torch_form] = _OPERATOR[ours] = operator


for _name, _operator in {
    "Conv2d": "conv2d",
    "BatchNorm2d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "MaxPool2d": "max_pool2d",
    "LocalResponseNorm": "local_response_norm",
}.items():
    register_torch_form(getattr(torch.nn, _name), getattr(nn, _name), _operator)
_TWINS = dict(_OURS)  # the layers of torch.nn itself
register_torch_form(nn.TorchConcat, nn.Concat, "concat")
register_torch_form(nn.TorchSubsample2d, nn.Subsample2d, "subsample")


@dataclass(frozen=True)
class LayerChange:
    """A layer whose class was changed; names: all under which the network holds it."""

    names: tuple[str, ...]
    operator: str
    before: str
    after: str


@dataclass(frozen=True)
class LayerLeft:
    """A layer that stayed as it was, and why. `asked` is True where ops or filter_fn wanted that."""

    names: tuple[str, ...]
    layer: str
    reason: str
    asked: bool = False


@dataclass
class ConversionReport:
    """What was changed, what was left and why; `print(report)` shows both."""

    changed: list[LayerChange] = field(default_factory=list)
    left: list[LayerLeft] = field(default_factory=list)

    def __str__(self) -> str:
        kinds: dict[tuple[str, str], int] = {}
        for change in self.changed:
            kind = change.before, change.after
            kinds[kind] = kinds.get(kind, 0) + 1
        lines = [f"{len(self.changed)} layers changed, {len(self.left)} left"]
        lines += [f"  {count:4d} × {before} -> {after}" for (before, after), count in kinds.items()]
        lines += [f"  left: {_joined(left.names)} ({left.layer}): {left.reason}" for left in self.left]
        return "\n".join(lines)


def convert(
    model: Module,
    ops: str | Iterable[str] = "all",
    filter_fn: Filter | None = None,
    strict: bool = False,
) -> ConversionReport:
    """Puts a network's layers on these kernels, in place, by changing their class.

    Exactly the classes `Conv2d`, `BatchNorm2d`, `SyncBatchNorm`, `MaxPool2d` and `LocalResponseNorm` of torch.nn
    become those of `cuda_cnn.nn`; ReLU, Linear and all else stay torch's. Results differ from torch's by rounding. A
    layer that looks like one of them and is none (a subclass, parametrized, quantised, lazy, of another rank, on
    another device) is left, and listed with the reason. Converting twice changes nothing.

    Args:
        model: any network, also one layer, one in use by an optimiser, or one wrapped in DistributedDataParallel.
        ops: "all", or some of "conv2d", "batch_norm", "max_pool2d", "local_response_norm".
        filter_fn: called with (layer, its name) for each layer that could be changed; False leaves it. A layer with
            several names is changed if all of them pass.
        strict: raise, before anything is changed, if a layer would be left that ops and filter_fn ask for.

    Returns:
        ConversionReport: `changed` and `left`, and a text when printed.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: an operator that does not exist; with strict, the layers that would be left.
    """
    return _swap("convert", model, _OURS, _selected(ops), filter_fn, strict)


def revert(model: Module) -> ConversionReport:
    """Puts a network's layers on torch.nn's own code, in place: undoes :func:`convert`.

    Works on copies, on unpickled networks, under DistributedDataParallel, on networks that were never converted
    (nothing happens), and on those of :func:`cuda_cnn.create_model`, which become plain torch networks with the same
    numbers but for rounding. What has no twin in torch.nn (LeNet-5's sub-sampling, the dense block) becomes a module
    written in torch's functions.

    Returns:
        ConversionReport: `changed` and `left`.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    return _swap("revert", model, _TORCH, set(_OPERATOR.values()), None, False)


def _selected(ops: str | Iterable[str]) -> set[str]:
    known = sorted(set(_OPERATOR.values()))
    chosen = (
        set(known) if isinstance(ops, str) and ops == "all" else {ops} if isinstance(ops, str) else set(ops)
    )
    if unknown := chosen - set(known):
        raise ValueError(f'convert: expected ops "all" or some of {known}, got {sorted(map(repr, unknown))}')
    return chosen


def _swap(
    function: str, model: Module, to: dict[type, type], ops: set[str], filter_fn: Filter | None, strict: bool
) -> ConversionReport:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    report, layers = ConversionReport(), []
    for names, layer in _layers(model):
        before = type(layer)
        reason, asked = _why_not(layer, to), False
        if before in to and reason is None:
            refused = [n for n in names if filter_fn is not None and not filter_fn(layer, n)]
            if _OPERATOR[before] not in ops:
                reason, asked = f"{_OPERATOR[before]} is not in ops", True
            elif refused:
                reason, asked = f"filter_fn refused {_joined(tuple(refused))}", True
        if reason is not None:
            report.left.append(LayerLeft(names, _class_name(before), reason, asked))
        elif before in to:
            after = to[before]
            layers.append((layer, after))
            report.changed.append(
                LayerChange(names, _OPERATOR[before], _class_name(before), _class_name(after))
            )
    unasked = [left for left in report.left if not left.asked]
    if strict and unasked:
        report.left = unasked
        raise ValueError(f"{function}: strict, and {len(unasked)} layers cannot be changed:\n{report}")
    for layer, after in layers:
        layer.__class__ = after
    return report


def _layers(model: Module) -> Iterator[tuple[tuple[str, ...], Module]]:
    """Every module once, with all its names; the network itself has the name ""."""
    found: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    for module, names in found.items():
        yield tuple(names), module


def _why_not(layer: Module, to: dict[type, type]) -> str | None:
    """Why a layer is not changed; None where it can be, or where nobody would expect it to be."""
    kind = type(layer)
    if kind in to:
        return _obstacle(layer) if to is _OURS else None
    if kind in _OPERATOR:  # on the wanted side already
        return None
    if isinstance(layer, torch.jit.ScriptModule):
        return "scripted" if getattr(layer, "original_name", "") in {t.__name__ for t in _OURS} else None
    if kind.__module__.startswith("torch.ao.nn") or kind.__module__.startswith("torch.nn.quantized"):
        return "quantised" if any(t.__name__.removesuffix("2d") in kind.__name__ for t in _TWINS) else None
    if not isinstance(layer, tuple(to)):
        other_rank = isinstance(layer, _ConvNd | _BatchNorm | _MaxPoolNd) and not isinstance(
            layer, tuple(_OPERATOR)
        )
        return "there is no kernel for it" if other_rank and to is _OURS else None
    if is_parametrized(layer):
        return "parametrized: its class is its own; convert before, or remove the parametrizations"
    if isinstance(layer, LazyModuleMixin):
        return "lazy: its parameters do not exist before the first batch"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "wrapped by fully_shard: convert before that"
    return f"a subclass of {_class_name(next(b for b in kind.__mro__ if b in to))}, whose code may be another"


def why_left(layer: Module) -> str | None:
    """Why a layer is not on these kernels: what `convert` would say, or that nobody has called it. None: it is, or
    it is no layer that has a counterpart here."""
    if type(layer) in _OURS and _obstacle(layer) is None:
        return f"{_class_name(type(layer))} is not converted"
    return _why_not(layer, _OURS)


def _obstacle(layer: Module) -> str | None:
    """What keeps a layer of the right class from running on these kernels."""
    if getattr(layer, "qconfig", None) is not None:
        return "quantised: it has a qconfig"
    if "forward" in vars(layer):
        return "its forward is replaced on the object"
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.dtype not in DTYPES:
            return f"{name} is of dtype {parameter.dtype}"
        if parameter.layout != torch.strided:
            return f"{name} is not dense: {parameter.layout}"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"{name} is on {parameter.device}"
        if parameter.device.type == "cuda" and not _C.with_cuda:
            return (
                f"{name} is on {parameter.device}, and cuda_cnn was built without CUDA: cuda-cnn env says why"
            )
    return None


def _class_name(kind: type) -> str:
    module = kind.__module__
    for public in ("torch.nn", "cuda_cnn.nn"):
        if module.startswith(public):
            module = public
    return f"{module}.{kind.__qualname__}"


def _joined(names: tuple[str, ...]) -> str:
    return ", ".join(name or "(the network itself)" for name in names)
