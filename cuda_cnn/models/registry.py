"""The networks by name: `create_model("lenet5")`, `list_models("resnet*")`.

A module in this package adds a network with

    @register_model
    def alexnet(num_classes: int = 1000, in_chans: int = 3, **kwargs) -> nn.Module: ...

and its class offers `forward_features(x) -> list[Tensor]` (the maps after each stage, finest first) and
`head_names` (the children that only the classifier needs), which serve `features_only=True`.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["FeaturesOnly", "builder_parameters", "create_model", "list_models", "nearest", "register_model"]

Builder = Callable[..., nn.Module]
_builders: dict[str, Builder] = {}


def register_model(builder: Builder | None = None, *, name: str | None = None) -> Builder:
    """Decorator: offers `builder` under its own name, or under `name`."""
    if builder is None:
        return lambda function: register_model(function, name=name)
    key = name or builder.__name__
    if key in _builders:
        raise ValueError(f"model {key!r} is registered twice")
    _builders[key] = builder
    return builder


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    **kwargs,
) -> nn.Module:
    """Builds the network called `name`, with freshly initialised weights.

    num_classes, in_chans: None keeps the paper's own.
    features_only: return a network without its classifier, which gives the list of maps after each stage.
    kwargs: whatever else the network's builder takes.

    Raises ValueError for an unknown name (the nearest ones are suggested), TypeError for an unknown argument.
    """
    builder = _builder(name)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if in_chans is not None:
        kwargs["in_chans"] = in_chans
    model = builder(**kwargs)
    return FeaturesOnly(model) if features_only else model


def list_models(pattern: str = "*") -> list[str]:
    """Names of all networks that match a shell-style pattern, sorted: `list_models("vgg*_bn")`."""
    _load_all()
    return sorted(fnmatch.filter(_builders, pattern))


def builder_parameters(name: str) -> set[str]:
    """Names of the arguments that `create_model(name, …)` takes."""
    return set(inspect.signature(_builder(name)).parameters)


def nearest(name: str, known) -> str:
    """The tail of an error message: `: did you mean 'a' or 'b'?`, or the list of known names."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if close:
        return ": did you mean " + " or ".join(repr(c) for c in close) + "?"
    return ": known are " + ", ".join(sorted(known))


class FeaturesOnly(nn.Module):
    """A network without its head; forward returns the maps after each stage, finest first."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for child in model.head_names:
            setattr(model, child, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_features(x)


def _builder(name: str) -> Builder:
    _load_all()
    if name not in _builders:
        raise ValueError(f"unknown model {name!r}{nearest(name, _builders)}")
    return _builders[name]


def _load_all() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
