"""AlexNet's stochastic gradient descent (Krizhevsky et al., 2012, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AlexNetSGD"]


class AlexNetSGD(Optimizer):
    """v ← μ·v − λ·ε·w − ε·g;  w ← w + v, with momentum μ = 0.9 and weight decay λ = 0.0005.

    The learning rate ε is inside the velocity: after ε was lowered the old steps go on at their old size. In
    `torch.optim.SGD` it multiplies the velocity, so that they shrink at once; at a constant ε both are the
    same.

    Raises ValueError for a negative argument; in `step`, RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
    ):
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"AlexNetSGD: expected {name} of at least 0, got {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            gradients = [w.grad for w in weights]
            if any(g.is_sparse for g in gradients):
                raise RuntimeError("AlexNetSGD: sparse gradients are not supported")
            velocities = [self._velocity(w) for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, weights, alpha=-group["weight_decay"] * group["lr"])
            torch._foreach_add_(velocities, gradients, alpha=-group["lr"])
            torch._foreach_add_(weights, velocities)
        return loss

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["velocity"]
