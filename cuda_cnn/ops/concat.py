"""Concatenation along any dimension, and its relative: writing into some channels of a buffer."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cuda_cnn._C import eager


def _is_legacy_empty(shape: Sequence[int]) -> bool:
    """torch.cat passes over tensors of shape (0,) whatever the other shapes are."""
    return len(shape) == 1 and shape[0] == 0


def concat(tensors: Sequence[Tensor], dim: int = 0, *, out: Tensor | None = None) -> Tensor:
    """Tensors side by side along `dim`: DenseNet's and GoogLeNet's join of feature maps, with `dim=1`.

    Equivalent to: `torch.cat(tensors, dim)`. Gradients are slices of the incoming one, without a copy.

    Args:
        tensors: list or tuple, equal in every dimension but `dim`; those of shape (0,) are passed over. Any
            dtype; different ones are promoted.
        dim: −D … D − 1.
        out: if given, torch.cat itself writes there.

    Returns:
        Tensor; channels_last if every input is.

    Raises:
        ValueError: no tensors.
        TypeError: not a list or tuple of Tensors.
        IndexError: no such dimension.
        RuntimeError: different shapes or devices, a tensor without dimensions.

    Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, 2018, §3.
    """
    if out is None and not is_dynamo_compiling():
        y = eager.concat(tensors, dim)
        if y is not NotImplemented:
            return y
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"concat: tensors must be tuple of Tensors, not {type(tensors).__name__}")
    if not tensors:
        raise ValueError("concat: expected a non-empty list of Tensors")
    if has_torch_function(tensors):
        return handle_torch_function(concat, tuple(tensors), tensors, dim, out=out)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"concat: expected Tensor as element {i} of tensors, but got {type(tensor).__name__}"
            )
    if out is not None:
        return torch.cat(tensors, dim, out=out)
    if len({t.dtype for t in tensors}) > 1:
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        tensors = [t.to(dtype) for t in tensors]
    return torch.ops.cuda_cnn.concat(tensors, dim)


def channel_buffer(x: Tensor, channels: int) -> Tensor:
    """(N, channels, H, W) for write_channels_: of x's dtype and device, channels_last, nothing in it yet."""
    return torch.ops.cuda_cnn.channel_buffer(x.detach(), channels)


def write_channels_(buffer: Tensor, x: Tensor, start: int) -> Tensor:
    """`buffer[:, start : start + x.shape[1]] = x`, threaded, for DenseNet's block buffer. Returns the buffer.

    The buffer is a plain store outside autograd: whatever Function fills it gives the gradients (slices).

    Args:
        buffer: (N, C, *), dense, contiguous or channels_last.
        x: (N, c, *), the buffer's dtype and device, any layout.
        start: first channel, 0 … C − c.

    Raises:
        RuntimeError: shapes, dtypes or devices differ, channels out of range, the buffer is not dense, or
            gradients would be lost.
    """
    if torch.is_grad_enabled() and (buffer.requires_grad or x.requires_grad):
        raise RuntimeError("write_channels_: the buffer is outside autograd; call it under torch.no_grad()")
    torch.ops.cuda_cnn.write_channels_(buffer, x, start)
    return buffer


@torch.library.register_fake("cuda_cnn::concat")
def _(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.empty_like(torch.cat(list(tensors), dim))


@torch.library.register_fake("cuda_cnn::channel_buffer")
def _(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("cuda_cnn::write_channels_")
def _(buffer: Tensor, x: Tensor, start: int) -> None:
    return None


@torch.library.register_vmap("cuda_cnn::concat")
def _(info: Any, in_dims: tuple, tensors: Sequence[Tensor], dim: int) -> tuple[Tensor, int]:
    """The mapped dimension goes in front; a tensor of shape (0,) keeps its meaning by being left out."""
    mapped, in_dims = [], in_dims[0]
    for tensor, in_dim in zip(tensors, in_dims, strict=True):
        rest = list(tensor.shape)
        if in_dim is not None:
            del rest[in_dim]
        if _is_legacy_empty(rest) and len(tensors) > 1:
            continue
        mapped.append(tensor.expand(info.batch_size, *rest) if in_dim is None else tensor.movedim(in_dim, 0))
    return torch.ops.cuda_cnn.concat(mapped, dim + 1 if dim >= 0 else dim), 0
