"""Switches of the CPU kernels, as attributes of this module.

- `winograd` (bool, True): 3×3 to 5×5 convolutions of stride 1 and stems, but of float64, may use Winograd's minimal
  filtering, which is faster and rounds otherwise than a direct sum (in bfloat16 on AVX512-BF16: 3×3 and 5×5).
- `conv2d_algorithm` (str, "auto"): forces one algorithm for every convolution that it can compute:
  "winograd", "depthwise", "gemm_nchw" (contiguous tensors), "few_pixels", "few_channels", "gemm" or "reference".
  For tests, benchmarks and readers who climb the ladder.

`with cuda_cnn.backends.flags(winograd=False): …` sets them for a block. They hold for the whole process, until
`cuda_cnn.reset()`.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_DEFAULTS: dict[str, Any] = {"winograd": True, "conv2d_algorithm": "auto"}
_values = dict(_DEFAULTS)


class _Backends(types.ModuleType):
    @property
    def winograd(self) -> bool:
        return _values["winograd"]

    @winograd.setter
    def winograd(self, allowed: bool) -> None:
        torch.ops.cuda_cnn.conv2d_allow_winograd(bool(allowed))
        _values["winograd"] = bool(allowed)

    @property
    def conv2d_algorithm(self) -> str:
        return _values["conv2d_algorithm"]

    @conv2d_algorithm.setter
    def conv2d_algorithm(self, name: str) -> None:
        if not torch.ops.cuda_cnn.conv2d_set_algorithm(name):
            raise ValueError(f"backends: expected a conv2d_algorithm that exists, got {name!r}")
        _values["conv2d_algorithm"] = name


@contextlib.contextmanager
def flags(**values: Any) -> Iterator[None]:
    """Sets the named switches for a block of code."""
    module = sys.modules[__name__]
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def reset() -> None:
    """Every switch as it was at import."""
    for name, value in _DEFAULTS.items():
        setattr(sys.modules[__name__], name, value)


sys.modules[__name__].__class__ = _Backends
