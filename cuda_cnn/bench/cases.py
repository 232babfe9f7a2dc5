"""A layer's pass as calls on the same tensors, ours and its rivals', each verified against float64 before timing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _C, backends
from ..env import instruction_set
from ..models.registry import nearest
from ..ops.conv2d import algorithm as conv2d_algorithm
from . import cudnn_frontend, rivals
from .devices import CpuDevice, Device
from .settings import DTYPES, LAYOUTS, TOLERANCE, UnequalError, dtype_of
from .shapes import Layer
from .timing import Call
from .work import operand_shapes, passes

__all__ = ["IMPLEMENTATIONS", "Case", "Problem", "UnavailableError", "WrongResultError"]

IMPLEMENTATIONS = ("cuda_cnn", "torch", "compile", "cudnn", "reference")
_DIRECTIONS = {"forward": "forward", "dgrad": "input_grad", "wgrad": "weight_grad"}


class WrongResultError(RuntimeError):
    """An output that is not the operator's: it is not timed."""


class UnavailableError(RuntimeError):
    """An implementation that this machine, dtype or pass does not have."""


@dataclass(frozen=True)
class Case:
    """One implementation of one pass. error: the largest one against float64, over the largest value."""

    call: Call
    error: float
    algorithm: str
    notes: list[str] = field(default_factory=list)


class Problem:
    """A layer's tensors, drawn once for all implementations and passes, and the exact answers."""

    def __init__(
        self,
        layer: Layer,
        batch: int,
        dtype: str = "float32",
        layout: str = "channels_last",
        device: Device | None = None,
    ) -> None:
        for what, name, known in (("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}")
        self.layer, self.batch, self.dtype, self.layout = layer, batch, dtype, layout
        self.device = device or CpuDevice()
        generator = torch.Generator().manual_seed(0)
        shapes = operand_shapes(layer, batch)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float32).double() for shape in shapes]
        if layer.op == "conv2d":
            drawn[1] = drawn[1] / (drawn[1][0].numel() ** 0.5)
        self.exact_operands = [self._place(t) for t in drawn]
        self.tensors = [t.to(dtype_of(dtype)) for t in self.exact_operands]
        self.generator = generator
        self._exact: dict[str, list[Tensor]] = {}
        self._gradient: Tensor | None = None

    def case(self, direction: str, implementation: str) -> Case:
        """Raises WrongResultError where the output is off by more than rounding, UnavailableError, UnequalError."""
        if direction not in passes(self.layer.op):
            raise UnavailableError(f"{self.layer.op} has no pass {direction}")
        name, _, variant = implementation.partition(":")
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {name!r}{nearest(name, IMPLEMENTATIONS)}")
        around = self._switches(name, variant)
        with around():
            run = self._run(direction, name, variant)
            outputs = run()
            outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
            algorithm = self._algorithm(direction, name)
        exact = self._exact_outputs(direction)
        notes = self._equal(outputs, exact)
        error = max(map(_error, outputs, exact))
        if not error <= TOLERANCE[self.dtype]:
            raise WrongResultError(
                f"{implementation} {direction} of {self.layer}: error {error:.1e} against float64, "
                f"expected at most {TOLERANCE[self.dtype]:.0e}"
            )
        return Case(Call(run, around), error, algorithm, notes)

    # ---- Tensors ----------------------------------------------------------------------------------------

    def _place(self, t: Tensor) -> Tensor:
        """Rounded to bfloat16, so that every dtype starts from the same numbers."""
        t = t.bfloat16().double().to(self.device.torch_device)
        return t.contiguous(memory_format=LAYOUTS[self.layout]) if t.dim() == 4 else t

    def _gradient_of(self, y: Tensor) -> Tensor:
        if self._gradient is None:
            drawn = torch.randn(y.shape, generator=self.generator, dtype=torch.float32).double()
            self._gradient = self._place(drawn)
        return self._gradient.to(y.dtype)

    def _wanted(self, direction: str, leaves: list[Tensor]) -> list[Tensor]:
        """The operands whose gradients the pass gives."""
        if self.layer.op == "conv2d" and direction != "full":
            return [leaves[0 if direction == "dgrad" else 1]]
        return leaves

    # ---- Calls ------------------------------------------------------------------------------------------

    def _run(self, direction: str, name: str, variant: str) -> Callable[[], object]:
        if name == "cudnn":
            reason = cudnn_frontend.missing(self.layer, direction, self.layout, self.device)
            if reason:
                raise UnavailableError(reason)
            return cudnn_frontend.best_plan(self.layer, direction, self._operands(direction), self.dtype)
        leaves = [t.detach() for t in self.tensors]
        if direction == "forward":
            return self._without_gradients(name, variant, leaves)
        wanted = self._wanted(direction, leaves)
        for leaf in wanted:
            leaf.requires_grad_()
        call = self._callable(name, variant, leaves, frozen=False)
        if direction == "full":
            gradient = self._gradient_of(call())
            return lambda: torch.autograd.grad(call(), wanted, gradient)
        y = call()
        gradient = self._gradient_of(y)
        return lambda: torch.autograd.grad(y, wanted, gradient, retain_graph=True)

    def _without_gradients(self, name: str, variant: str, leaves: list[Tensor]) -> Callable[[], object]:
        call = self._callable(name, variant, leaves, frozen=self.device.kind == "cpu")

        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def _callable(self, name: str, variant: str, leaves: list[Tensor], frozen: bool) -> Callable[[], Tensor]:
        if name == "compile":
            return rivals.compiled(self.layer, leaves, self.device.kind, frozen, bool(variant))
        library = rivals.LIBRARIES[name]
        return lambda: rivals.apply(library, self.layer, leaves)

    def _operands(self, direction: str) -> list[Tensor]:
        """For the graph interface of cuDNN: x, w, and the output's gradient."""
        x, w = self.tensors[:2]
        y = self._exact_outputs("forward")[0]
        return [x, w, self._gradient_of(y).to(x.dtype)]

    def _switches(self, name: str, variant: str) -> Callable[[], contextlib.AbstractContextManager]:
        """`cuda_cnn:gemm` forces an algorithm, `cuda_cnn:baseline` an instruction set."""
        if not variant or (name, variant) == ("compile", "max-autotune"):
            return contextlib.nullcontext
        if name != "cuda_cnn":
            raise ValueError(f"only cuda_cnn has variants, not {name}:{variant}")
        if variant in _C.cpu_isas():
            return lambda: instruction_set(variant)
        with backends.flags(conv2d_algorithm=variant):  # a ValueError for an unknown one
            pass
        if self.layer.op != "conv2d":
            raise UnavailableError(f"{self.layer.op} has no algorithm {variant!r}")
        return lambda: backends.flags(conv2d_algorithm=variant)

    def _algorithm(self, direction: str, name: str) -> str:
        if name != "cuda_cnn" or self.device.kind != "cpu":
            return ""
        if self.layer.op != "conv2d":
            return _C.cpu_isa()
        a = self.layer.args
        shapes = operand_shapes(self.layer, self.batch)[:2]
        pairs = [(a[key],) * 2 for key in ("stride", "padding")]
        wanted = _DIRECTIONS.values() if direction == "full" else [_DIRECTIONS[direction]]
        rest = (*pairs, (1, 1), a["groups"], dtype_of(self.dtype))
        taken = [conv2d_algorithm(d, *shapes, *rest, nchw=self.layout == "contiguous") for d in wanted]
        return "/".join(dict.fromkeys(taken))

    # ---- Verification -------------------------------------------------------------------------------------

    def _exact_outputs(self, direction: str) -> list[Tensor]:
        if direction not in self._exact:
            leaves = [t.detach() for t in self.exact_operands]
            wanted = self._wanted(direction, leaves) if direction != "forward" else []
            for leaf in wanted:
                leaf.requires_grad_()
            y = rivals.apply(rivals.TORCH, self.layer, leaves)
            outputs = [y] if not wanted else torch.autograd.grad(y, wanted, self._gradient_of(y))
            self._exact[direction] = [t.detach() for t in outputs]
        return self._exact[direction]

    def _equal(self, outputs: list[Tensor], exact: list[Tensor]) -> list[str]:
        notes = []
        for found, wanted in zip(outputs, exact, strict=True):
            if found.dtype != dtype_of(self.dtype) or found.shape != wanted.shape:
                raise UnequalError(
                    f"{self.layer}: expected {dtype_of(self.dtype)} of shape {list(wanted.shape)}, "
                    f"got {found.dtype} of shape {list(found.shape)}"
                )
            if found.dim() == 4 and not found.is_contiguous(memory_format=LAYOUTS[self.layout]):
                notes.append(f"gives another layout than {self.layout}")
        return sorted(set(notes))


def _error(found: Tensor, exact: Tensor) -> float:
    if not found.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()
