"""What rivals must have in common, and what is refused because it is not equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["DTYPES", "LAYOUTS", "TOLERANCE", "UnequalError", "check_equal", "dtype_of", "precision"]

# Largest error over largest value: rounding of long sums stays well below, a wrong tap is far above.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float64": 1e-12, "bfloat16": 2e-2, "float16": 5e-3}
DTYPES = tuple(TOLERANCE)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class UnequalError(ValueError):
    """A comparison under settings that are not the same for both: it is not made."""


def dtype_of(name: str) -> torch.dtype:
    """ "tf32" is float32 with TensorFloat-32 multiplications, on both sides."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """TensorFloat-32 for all rivals, or for none; cuDNN may search its plans."""
    cudnn, matmul, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul, name == "tf32"
    before = matmul.allow_tf32
    # flags() holds also where torch.testing has frozen plain assignment.
    with cudnn.flags(cudnn.enabled, True, deterministic=cudnn.deterministic, allow_tf32=tf32):
        matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            matmul.allow_tf32 = before


def check_equal(dtype: str, device: str) -> None:
    """Raises UnequalError where a switch of torch would let one rival compute with fewer bits, or for dtypes that the
    device has not."""
    if dtype == "tf32" and device != "cuda":
        raise UnequalError("--dtype tf32: TensorFloat-32 is a GPU's; a CPU has float32")
    if torch.is_autocast_enabled(device):
        raise UnequalError("autocast is on: the rivals would compute in a dtype that was not asked for")
    if device == "cpu" and dtype == "float32":
        switches = {
            "torch.backends.mkldnn.conv.fp32_precision": torch.backends.mkldnn.conv.fp32_precision,
            "torch.backends.mkldnn.matmul.fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,
        }
        for name, value in switches.items():
            if value not in ("none", "ieee"):
                raise UnequalError(f"{name} is {value!r}: torch would not compute float32 in float32")
