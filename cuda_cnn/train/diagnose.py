"""Which layer a NaN came from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NonFiniteError", "first_non_finite"]


class NonFiniteError(ValueError):
    """The loss became NaN or infinite."""


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Runs `images` through the network again; says where NaN or Inf first appears: layer, and what of it."""
    if not images.isfinite().all():
        return "the input pictures"
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if found or not isinstance(output, Tensor) or output.isfinite().all():
            return
        bad = [p for p, value in module.named_parameters(recurse=False) if not value.isfinite().all()]
        where = f"its {' and '.join(bad)}" if bad else "its output"
        found.append(f"layer {name!r} ({type(module).__name__}), in {where}")

    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: look(name, m, i, o))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss itself (every layer's output is finite)"
