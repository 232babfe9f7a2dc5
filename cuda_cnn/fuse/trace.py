"""A network as a torch.fx graph: layers are its nodes; a part that cannot be followed is one node too."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

import cuda_cnn.nn as cnn

CONVOLUTIONS = (nn.Conv2d, cnn.Conv2d)
NORMS = (nn.BatchNorm2d, cnn.BatchNorm2d)
POOLS = (nn.MaxPool2d, cnn.MaxPool2d)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_norm_with_activation(module: nn.Module) -> bool:
    """timm's BatchNormAct2d: batch normalisation, dropout (mostly none), activation."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


class Untraceable(Exception):  # noqa: N818
    """Why a module's forward cannot be followed."""


def _in_place(function: Callable) -> Callable:
    return lambda a, b: a.tracer.create_proxy("call_function", function, (a, b), {})


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is, which fx's own takes for `a = a + b`: another tensor may share a's memory."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)


class Tracer(fx.Tracer):
    """Follows containers; modules with parameters or hooks of their own are leaves, and so is what cannot be
    followed: `opaque` names those, with the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if super().is_leaf_module(module, qualified_name) or type(module).__module__ == cnn.__name__:
            return True
        if has_hooks(module):
            self.opaque[qualified_name] = "it has hooks"
        elif "forward" in module.__dict__:
            self.opaque[qualified_name] = "its forward is replaced"
        owns = any(True for _ in (*module.parameters(False), *module.buffers(False)))
        return owns or qualified_name in self.opaque

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return self.create_proxy("call_module", name, args, kwargs)
        before = len(self.graph.nodes)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            for node in list(self.graph.nodes)[: before - 1 : -1]:
                self.graph.erase_node(node)
            self.opaque[name] = f"it cannot be traced ({type(error).__name__}: {error})".split("\n")[0]
            return self.create_proxy("call_module", name, args, kwargs)


def trace(module: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    tracer = Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    return graph, tracer.opaque
