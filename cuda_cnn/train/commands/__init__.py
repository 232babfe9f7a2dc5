"""The commands `train`, `evaluate` and `predict`, one module each."""

from __future__ import annotations

import torch

__all__ = ["device"]


def device(name: str) -> torch.device:
    """The device of --device: "auto" is the GPU where there is one. ValueError where it cannot be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {name!r} is no device") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees no GPU (see: python -m cuda_cnn env)"
        )
    return chosen
