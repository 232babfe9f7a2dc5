"""PyTorch's own operators, spoken by these kernels: each function has the schema of an aten operator.

One that cannot serve a call says so with :class:`DeclinedError`, or our operator's own check does with a RuntimeError
before anything is done, and PyTorch's kernel does the work. All of it runs below autograd: aten's derivatives stay in
charge, and call the backward operators of this table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cuda_cnn._C import eager
from cuda_cnn.ops import _library
from cuda_cnn.ops.conv2d import channels_last
from cuda_cnn.ops.max_pool2d import MAX_BYTE_TAPS


class DeclinedError(Exception):
    """Why a call is PyTorch's to serve."""


class NotOursError(DeclinedError):
    """The call is of a kind that these kernels do not claim to have."""


class Override(NamedTuple):
    name: str  # of the aten operator, with its overload
    operator: str  # the group that `use(ops=…)` names
    kernel: Callable
    tensors: int = (
        1  # how many of its first arguments are tensors whose shapes say which call it is; 0: a list of them
    )
    keys: tuple[str, ...] = ("CPU", "CUDA")
    logged: bool = True


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise DeclinedError(reason)


def _pair(values: Sequence[int]) -> tuple[int, ...]:
    return (*values, *values) if len(values) == 1 else tuple(values)


# ---- conv2d -------------------------------------------------------------------------------------------------


def _geometry(x: Tensor, weight: Tensor, transposed: bool, *lists: Sequence[int]) -> list[tuple[int, ...]]:
    if transposed or not weight.dim() == x.dim() == 4:
        kind = "transposed" if transposed else "convolution"
        raise NotOursError(f"{weight.dim() - 2}-D {kind}")
    _require(x.shape[1] > 0, "no channels, of which torch makes a result without channels")
    return [_pair(values) for values in lists]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *_flags: bool,
) -> Tensor:
    geometry = _geometry(x, weight, transposed, stride, padding, dilation)
    y = eager.conv2d(x, weight, bias, *geometry, groups)
    return _library.ops.conv2d(x, weight, bias, *geometry, groups) if y is NotImplemented else y


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    geometry = _geometry(x, weight, transposed, stride, padding, dilation)
    rest = (*geometry, groups, channels_last(x, weight))
    dx = _library.ops.conv2d_input_grad(dy, weight, x.shape, *rest) if output_mask[0] else None
    dw = _library.ops.conv2d_weight_grad(dy, x, weight.shape, *rest) if output_mask[1] else None
    db = _library.ops.conv2d_bias_grad(dy) if output_mask[2] else None
    return dx, dw, db


# ---- max_pool2d ---------------------------------------------------------------------------------------------


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    window = [_pair(values) for values in (kernel_size, stride or kernel_size, padding, dilation)]
    y, _, indices = _library.ops.max_pool2d_with_indices(x, *window, ceil_mode)
    return y, indices


def max_pool2d_backward(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    window = [_pair(values) for values in (kernel_size, stride or kernel_size, padding, dilation)]
    taps = taps_of(indices, x.shape[-1], *window)
    return _library.ops.max_pool2d_backward(dy, taps, list(x.shape[-2:]), *window)


def taps_of(
    indices: Tensor,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Our form of torch's indices: the cell within its window, r·S + s, instead of that within the plane.

    index = i·width + j, with i = p·stride − padding + r·dilation and j alike."""
    row = torch.div(indices, width, rounding_mode="floor")
    top, left = (
        torch.arange(indices.shape[axis - 2], device=indices.device) * stride[axis] - padding[axis]
        for axis in (0, 1)
    )
    top, taps_a_row = top[:, None], kernel_size[1]
    if dilation == (1, 1):  # linear in the index
        tap = torch.sub(indices, row, alpha=width - taps_a_row).sub_(top * taps_a_row + left)
    else:
        r = torch.div(row - top, dilation[0], rounding_mode="floor")
        s = torch.div(indices - row * width - left, dilation[1], rounding_mode="floor")
        tap = r * taps_a_row + s
    wide = kernel_size[0] * kernel_size[1] > MAX_BYTE_TAPS
    return tap.to(torch.int32 if wide else torch.uint8)


# ---- batch_norm ---------------------------------------------------------------------------------------------


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1/√(var + eps)), the last two empty outside training."""
    _require(x.numel() > 0, "an empty batch")
    found = eager.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    _require(found is not NotImplemented, "arguments that batch_norm would refuse")
    return found


def native_batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return native_batch_norm(x, weight, bias, None, None, training, momentum, eps)


def native_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _require(x.numel() > 0, "an empty batch")
    mean, var = running_mean, running_var
    if training:
        mean, var = save_mean, save_invstd.double().pow(-2).sub(eps)
    wants = [output_mask[0], output_mask[1] or output_mask[2], False]
    dx, dweight, dbias, _ = _library.ops.batch_norm_backward(
        dy, x, None, weight, None, mean, var, training, eps, False, wants
    )
    return tuple(d if wanted else None for d, wanted in zip((dx, dweight, dbias), output_mask, strict=True))


def batch_norm_without_cudnn(*arguments: Any) -> Tensor:
    """aten::batch_norm, led to native_batch_norm: cuDNN's operator hands its backward a reserve that is cuDNN's own."""
    *arguments, _cudnn_enabled = arguments
    return torch.ops.aten._batch_norm_impl_index(*arguments, False)[0]


# ---- concat -------------------------------------------------------------------------------------------------


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    for tensor in tensors:
        _require(tensor.dtype == first.dtype, "mixed dtypes")
        _require(tensor.layout == torch.strided, f"layout {tensor.layout}")
        _require(tensor.device == first.device, "two devices")
    y = eager.concat(tensors, dim)
    return _library.ops.concat(tensors, dim) if y is NotImplemented else y


OVERRIDES = (
    Override("convolution", "conv2d", convolution, 2),
    Override("_convolution", "conv2d", convolution, 2),
    Override("convolution_backward", "conv2d", convolution_backward, 3),
    Override("max_pool2d_with_indices", "max_pool2d", max_pool2d),
    Override("max_pool2d_with_indices_backward", "max_pool2d", max_pool2d_backward, 2),
    Override("native_batch_norm", "batch_norm", native_batch_norm),
    Override("_native_batch_norm_legit", "batch_norm", native_batch_norm),
    Override("_native_batch_norm_legit.no_stats", "batch_norm", native_batch_norm_no_stats),
    Override("native_batch_norm_backward", "batch_norm", native_batch_norm_backward),
    Override("batch_norm", "batch_norm", batch_norm_without_cudnn, 1, ("CUDA", "AutogradCUDA"), logged=False),
    Override("cat", "concat", cat, 0),
)
