"""LeNet-5's trainable sub-sampling (LeCun et al. 1998, section II.B)."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cuda_cnn._C import eager
from cuda_cnn.ops import _library

AMPLITUDE = 1.7159  # of the paper's squashing function A·tanh(S·a), with S = 2/3
SLOPE = 2 / 3


def subsample(
    input: Tensor,
    coefficient: Tensor,
    bias: Tensor,
    kernel_size: int | tuple[int, int] = 2,
    squash: str = "tanh",
) -> Tensor:
    r"""Sums each window, scales and shifts it by channel, and squashes the result.

    .. math:: y_{n,c,p,q} = f\Bigl(coefficient_c \sum_{window} x_{n,c} + bias_c\Bigr), \quad
              f(a) = 1.7159 \tanh(2a/3)

    Windows tile the plane; cells beyond the last whole window are left out.

    Equivalent to: `1.7159 * tanh(2/3 * (coefficient[:, None, None] * F.avg_pool2d(input, kernel_size,
    divisor_override=1) + bias[:, None, None]))`.

    Args:
        input: (N, C, H, W) or (C, H, W), N may be 0; float32, float64, bfloat16 or float16 (16-bit types
            compute in float32). contiguous and channels_last are both native.
        coefficient: (C,), the trainable factor of each map. Different dtypes are promoted.
        bias: (C,).
        kernel_size: of the window, and the distance between windows; an int or a pair.
        squash: "tanh" (the paper's), "sigmoid" or "none".

    Returns:
        Tensor (N, C, H // kernel_size, W // kernel_size) in the input's memory format.

    Raises:
        ValueError: an unknown squash.
        RuntimeError: another rank or dtype, a coefficient or bias of another shape, a plane smaller than a
            window.

    LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998, §II.B.
    """
    if not is_dynamo_compiling():
        y = eager.subsample(input, coefficient, bias, kernel_size, squash)
        if y is not NotImplemented:
            return y
    if has_torch_function((input, coefficient, bias)):
        return handle_torch_function(
            subsample, (input, coefficient, bias), input, coefficient, bias, kernel_size, squash
        )
    _library.check_tensors("subsample", input=input, coefficient=coefficient, bias=bias)
    if not input.dtype == coefficient.dtype == bias.dtype:
        dtype = torch.promote_types(torch.promote_types(input.dtype, coefficient.dtype), bias.dtype)
        input, coefficient, bias = input.to(dtype), coefficient.to(dtype), bias.to(dtype)
    window = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
    return torch.ops.cuda_cnn.subsample(input, coefficient, bias, window, squash)


@torch.library.register_fake("cuda_cnn::subsample")
def _(x: Tensor, coefficient: Tensor, bias: Tensor, kernel_size: list[int], squash: str) -> Tensor:
    plane = (x.shape[-2] // kernel_size[0], x.shape[-1] // kernel_size[1])
    return _library.empty_like_result(x, (*x.shape[:-2], *plane))


@torch.library.register_fake("cuda_cnn::subsample_backward")
def _(
    dy: Tensor, x: Tensor, coefficient: Tensor, y: Tensor, kernel_size: list[int], squash: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _library.empty_like_result(x),
        coefficient.new_empty(coefficient.shape),
        coefficient.new_empty(coefficient.shape),
    )


def _register_vmap(name: str) -> None:
    """The mapped dimension joins the channels, so that a sample may have coefficients of its own."""
    op = getattr(torch.ops.cuda_cnn, name)

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        def fold(t: Tensor, dim: int | None) -> Tensor:
            t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1) if t.dim() == 2 else t.movedim(0, -4).flatten(-4, -3)

        def unfold(t: Tensor) -> Tensor:
            return t.unflatten(0 if t.dim() == 1 else -3, (info.batch_size, -1))

        *tensors, kernel_size, squash = args
        results = op(*(fold(t, dim) for t, dim in zip(tensors, in_dims, strict=False)), kernel_size, squash)
        if isinstance(results, Tensor):
            return unfold(results), results.dim() - 3
        return tuple(map(unfold, results)), tuple(max(t.dim() - 3, 0) for t in results)

    torch.library.register_vmap(f"cuda_cnn::{name}", vmap)


_register_vmap("subsample")
_register_vmap("subsample_backward")
