"""Max-pooling. The gradient needs one number a window, its *tap*: which cell was the largest."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from cuda_cnn._C import eager
from cuda_cnn.ops import _library

Pair = int | tuple[int, int]

# A window of more cells has taps of four bytes.
MAX_BYTE_TAPS = 255


def _pair(name: str, value: Any) -> list[int]:
    """torch's own reading: an int, or one or two of them."""
    values = (
        [value]
        if isinstance(value, int | torch.SymInt)
        else list(value)
        if isinstance(value, tuple | list)
        else None
    )
    if values is None or not all(isinstance(v, int | torch.SymInt) for v in values):
        raise TypeError(f"max_pool2d: expected {name} to be an int or a tuple of two ints, got {value!r}")
    if len(values) not in (1, 2):
        raise RuntimeError(
            f"max_pool2d: {name} must either be a single int, or a tuple of two ints, got {value!r}"
        )
    return values * 2 if len(values) == 1 else values


def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The largest value of each window.

    .. math:: y_{n,c,p,q} = \max_{r,s} x_{n,c,i,j}, \quad i = p \cdot stride - padding + r \cdot dilation, \;
              j = q \cdot stride - padding + s \cdot dilation

    Padding does not count. The gradient goes to one cell of each window: in scan order the first of equal
    ones, and the last NaN before any number. Windows may overlap (AlexNet: size 3, stride 2).

    Equivalent to: `F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)`.

    Args:
        input: (N, C, H, W) or (C, H, W), N may be 0; float32, float64, bfloat16 or float16. contiguous and
            channels_last are both native.
        kernel_size: of the window, an int or a pair.
        stride: between windows; kernel_size if None.
        padding: cells around the plane, at most half of kernel_size.
        dilation: distance between a window's cells.
        ceil_mode: also keeps windows that reach beyond the right and lower edge.
        return_indices: also returns the position of each window's largest cell in its H·W plane, int64.

    Returns:
        Tensor of the input's dtype and memory format, or (Tensor, indices).

    Raises:
        RuntimeError: another rank or dtype, an empty dimension besides N, kernel_size, stride or dilation
            below 1, padding below 0 or above half of kernel_size, no window fits.
        TypeError: a size that is not an int.

    Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks,
    2012, §3.4.
    """
    if not is_dynamo_compiling() and return_indices is False:
        y = eager.max_pool2d(
            input, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode
        )
        if y is not NotImplemented:
            return y
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    _library.check_tensors("max_pool2d", input=input)
    kernel_size = _pair("kernel_size", kernel_size)
    window = (
        kernel_size,
        kernel_size if stride is None or stride == [] else _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        ceil_mode,
    )
    if return_indices:
        y, _, indices = torch.ops.cuda_cnn.max_pool2d_with_indices(input, *window)
        return y, indices
    return torch.ops.cuda_cnn.max_pool2d(input, *window)


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """As csrc/kernels/max_pool2d.h has it."""
    windows = (
        size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    ) // stride + 1
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows


def _fake_outputs(x: Tensor, window: tuple, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    *lists, ceil_mode = window
    plane = [pooled_size(x.shape[i - 2], *(values[i] for values in lists), ceil_mode) for i in range(2)]
    y = _library.empty_like_result(x, (*x.shape[:-2], *plane))
    return [torch.empty_like(y, dtype=dtype) for dtype in dtypes]


def _tap_dtype(kernel_size: list[int]) -> torch.dtype:
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= MAX_BYTE_TAPS else torch.int32


@torch.library.register_fake("cuda_cnn::max_pool2d")
def _(x: Tensor, *window: Any) -> Tensor:
    return _fake_outputs(x, window, (x.dtype,))[0]


@torch.library.register_fake("cuda_cnn::max_pool2d_with_taps")
def _(x: Tensor, *window: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_outputs(x, window, (x.dtype, _tap_dtype(window[0]))))


@torch.library.register_fake("cuda_cnn::max_pool2d_with_indices")
def _(x: Tensor, *window: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_outputs(x, window, (x.dtype, _tap_dtype(window[0]), torch.int64)))


@torch.library.register_fake("cuda_cnn::max_pool2d_backward")
def _(dy: Tensor, taps: Tensor, input_size: list[int], *window: Any) -> Tensor:
    return _library.empty_like_result(taps, (*taps.shape[:-2], *input_size)).to(dy.dtype)


@torch.library.register_fake("cuda_cnn::max_pool2d_gather")
def _(x: Tensor, taps: Tensor, *window: Any) -> Tensor:
    return torch.empty_like(_library.empty_like_result(taps), dtype=x.dtype)


def _register_vmap(name: str, tensors: int) -> None:
    """The mapped dimension becomes part of the batch; of an unbatched plane it is the batch."""
    op = getattr(torch.ops.cuda_cnn, name)

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        inputs, window = args[:tensors], args[tensors:]
        rank = inputs[0].dim() - (in_dims[0] is not None)
        folded = []
        for tensor, dim in zip(inputs, in_dims, strict=False):
            batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            folded.append(batched if rank == 3 else batched.flatten(0, 1))
        outputs = op(*folded, *window)

        def unfold(t: Tensor) -> Tensor:
            return t if rank == 3 else t.unflatten(0, (info.batch_size, -1))

        if isinstance(outputs, Tensor):
            return unfold(outputs), 0
        return tuple(map(unfold, outputs)), (0,) * len(outputs)

    torch.library.register_vmap(f"cuda_cnn::{name}", vmap)


for _name, _tensors in {
    "max_pool2d": 1,
    "max_pool2d_with_taps": 1,
    "max_pool2d_with_indices": 1,
    "max_pool2d_backward": 2,
    "max_pool2d_gather": 2,
}.items():
    _register_vmap(_name, _tensors)
