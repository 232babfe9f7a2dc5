"""How a module comes to run its fused graph: its `forward` is replaced on the instance, nothing else."""

from __future__ import annotations

import contextlib
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from cuda_cnn._C import eager
from cuda_cnn.fuse import layers
from cuda_cnn.fuse.report import Report, Row
from cuda_cnn.fuse.rewrite import Rewriter
from cuda_cnn.fuse.trace import Untraceable, has_hooks, trace

Around = Callable[[str, str], AbstractContextManager]

_PLANS = 4  # modes of one network worth keeping: training, inference, some layers frozen, …


class FusedForward:
    """Runs a module's fused graph, one for each mode of its layers; where it cannot, the module's own forward.

    Copies and pickles hold no graph: it is traced again when it is needed.
    """

    def __init__(self, module: nn.Module, recompute: bool) -> None:
        self.module, self.recompute = module, recompute
        self.plans: dict[bytes | tuple, tuple[nn.Module | None, Report]] = {}
        self.last: bytes | tuple | None = None

    # torch.export looks at its model's forward as at a function.
    @property
    def __code__(self) -> types.CodeType:
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __getstate__(self) -> dict:
        return {"module": self.module, "recompute": self.recompute, "plans": {}, "last": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _plain(args, kwargs):
            return type(self.module).forward(self.module, *args, **kwargs)
        run, _ = self.plan()
        if run is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return run(*args, **kwargs)

    def state(self) -> bytes | tuple:
        """All that a graph depends on: which layers there are, their modes and hooks."""
        plain = eager.state(self.module)
        if plain is not NotImplemented:
            return plain
        state, layers_left = [self.module.training], list(self.module._modules.values())
        while layers_left:
            layer = layers_left.pop()
            if layer is not None:
                state += id(layer), layer.training, has_hooks(layer)
                layers_left += layer._modules.values()
        return tuple(state)

    def plan(self) -> tuple[nn.Module | None, Report]:
        state = self.state()
        if state != self.last:
            for module in self.module.modules():
                layers.forget(module)  # weights may have been written past torch's version counters
            self.last = state
        if state not in self.plans:
            while len(self.plans) >= _PLANS:
                self.plans.pop(next(iter(self.plans)))
            self.plans[state] = _plan(self.module, self.recompute)
        return self.plans[state]


def _plan(module: nn.Module, recompute: bool) -> tuple[nn.Module | None, Report]:
    try:
        with _without_fused_forwards(module):
            graph, opaque = trace(module)
    except Untraceable as reason:
        report = Report("training" if module.training else "inference")
        report.left.append(Row("", f"it cannot be traced ({reason})"))
        return None, report
    rewriter = Rewriter(module, graph, opaque, recompute)
    return _runnable(module, rewriter.run()), rewriter.report


def _runnable(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    attributes = {
        node.target: operator.attrgetter(node.meta.get("layer", node.target))(module)
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    run = fx.GraphModule(attributes, graph)
    for name, value in attributes.items():
        if "." not in name:
            run.__dict__[name] = value  # where Python finds it sooner than in nn.Module's tables
    return run


class _without_fused_forwards:  # noqa: N801
    """While it is traced, a module has its own forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.fused = self.module.__dict__.pop("forward")

    def __exit__(self, *_: Any) -> None:
        self.module.__dict__["forward"] = self.fused


class _Watched(fx.Interpreter):
    """Runs a fused graph node by node, and tells which layer each node belongs to and what the report says of it."""

    def __init__(self, forward: FusedForward, around: Around) -> None:
        graph, report = forward.plan()
        super().__init__(graph)
        self.forward = forward
        self.what, self.around = {row.layer: row.what for row in report.fused}, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args) if _plain(args, kwargs) and not kwargs else self.forward(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        layer = _layer_of(n) if n.op == "call_function" else ""
        with self.around(layer, self.what[layer]) if layer in self.what else contextlib.nullcontext():
            return super().run_node(n)


def _layer_of(node: fx.Node) -> str:
    """The first layer that a node is given, itself or by its scale and shift."""
    parts = [a for a in node.args if isinstance(a, fx.Node)]
    for part in parts:
        if part.op == "get_attr":
            return part.meta.get("layer", str(part.target))
    vectors = (operator.getitem, layers.normalise, layers.frozen)
    return next((name for p in parts if p.target in vectors and (name := _layer_of(p))), "")


@contextlib.contextmanager
def watched(model: nn.Module, around: Around) -> Iterator[None]:
    """While it lasts, `around(layer, what the report says)` is entered for each layer that runs in a fused graph: the
    graph of now, whatever hooks are added in between."""
    fused = [(name, m, m.__dict__["forward"]) for name, m in model.named_modules() if is_fused(m)]
    for prefix, module, forward in fused:

        def named(layer: str, what: str, prefix: str = prefix) -> AbstractContextManager:
            return around(f"{prefix}.{layer}" if prefix else layer, what)

        if forward.plan()[0] is not None:
            module.forward = _Watched(forward, named)
    try:
        yield
    finally:
        for _, module, forward in fused:
            module.forward = forward


def _plain(args: tuple, kwargs: dict) -> bool:
    """Whether this is an eager call with plain tensors, outside of tracers, compilers and transforms."""
    values = (*args, *kwargs.values())
    return (
        all(not isinstance(v, fx.Proxy) for v in values)
        and any(isinstance(v, Tensor) and v.dim() == 4 and v.device.type != "meta" for v in values)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not nn.modules.module._has_any_global_hook()
    )


def is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), FusedForward)


def fuse(model: nn.Module, *, recompute: bool = True) -> Report:
    """Lets a network run with batch normalisation, ReLU and sums inside its convolutions.

    In place, and only `forward` of the model changes: modules, parameters, buffers, `state_dict`, hooks on the model
    and the optimiser stay. The graph is traced (torch.fx) for the mode that the model is in, and again when layers
    change theirs (`train()`, `eval()`), are replaced, or get hooks.

    Inference: normalisation folded into the convolution before it, or applied on the load of the one behind it; bias,
    sum and ReLU in the epilogue. Training: the batch's statistics in the epilogue of the convolution before,
    normalisation and ReLU on the load of the convolution behind; of a 1×1 convolution that ends a residual block
    nothing is kept but the block's result. A dense block is one buffer. Results are channels_last.

    Args:
        model: any network; layers that are exactly `torch.nn`'s (or this package's, or timm's BatchNormAct2d) are
            fused. A layer with hooks is left alone, so is what cannot be traced: its parts are tried one by one.
        recompute: of training. True: normalised maps are not kept for the backward pass, which needs about half the
            memory. False: a batch normalisation of a convolution is one pass with its sum and ReLU, whose result is
            kept as torch keeps it; on a CPU that is faster for a ResNet. Norms of a dense block's maps are the
            same either way.

    Returns:
        Report: what was fused and what was not, and why, for the mode that the model is in. A second call gives it
        again, with its own `recompute`.

    Under `torch.compile`, `torch.export`, `torch.func` and fx the model's own forward runs. `unfuse(model)` undoes it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if is_fused(model):
        for part in model.modules():
            if is_fused(part) and part.forward.recompute != recompute:
                part.forward = FusedForward(part, recompute)
        return _report(model)
    if "forward" in model.__dict__:
        report = Report("training" if model.training else "inference")
        report.left.append(Row("", "its forward is replaced"))
        return report
    model.forward = FusedForward(model, recompute)
    run, report = model.forward.plan()
    if run is None:
        del model.forward
        for name, child in model.named_children():
            report.add(fuse(child, recompute=recompute), name)
        return report
    for row in list(report.left):
        part = model.get_submodule(row.layer) if row.layer and _is_module(model, row.layer) else None
        if part is not None and any(part.children()) and "replaced" not in row.what:
            report.add(fuse(part, recompute=recompute), row.layer)
    return report


def _is_module(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules())


def _report(model: nn.Module) -> Report:
    _, report = model.forward.plan()
    whole = Report(report.mode, list(report.fused), list(report.left))
    for name, part in model.named_modules():
        if part is not model and is_fused(part):
            whole.add(part.forward.plan()[1], name)
    return whole


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in the model and in all its parts; of a network that is not fused nothing changes.

    Returns the model.
    """
    for module in model.modules():
        layers.forget(module)
        if is_fused(module):
            del module.forward
    return model
