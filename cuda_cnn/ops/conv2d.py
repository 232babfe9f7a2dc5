"""2-D convolution: forward, input, weight and bias gradient; each is the derivative of the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as torch_functional
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from cuda_cnn._C import eager
from cuda_cnn.ops import _library


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolves (cross-correlates) images with filters.

    .. math:: y_{n,k,p,q} = b_k + \sum_{c,r,s} w_{k,c,r,s} \,
              x_{n,\; gC/G + c,\; p\,s_h + r\,d_h - p_h,\; q\,s_w + s\,d_w - p_w}

    with g the group of output channel k, and x = 0 outside the image.

    Equivalent to: `F.conv2d(input, weight, bias, stride, padding, dilation, groups)`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16 (16-bit types sum in float32).
            channels_last is native; another layout is converted once on the way in and once on the way out.
        weight: (K, C/groups, R, S), of the input's dtype.
        bias: (K), or None.
        stride: of the window, one number or (vertical, horizontal).
        padding: zeros on each side, one number or (vertical, horizontal); "valid" is 0, and "same" keeps the
            size at stride 1 (the odd zero goes below and to the right).
        dilation: distance between the filter's taps.
        groups: channels are convolved in so many separate groups.

    Returns:
        (N, K, P, Q) with P = ⌊(H + 2·padding − dilation·(R − 1) − 1) / stride⌋ + 1, Q alike; channels_last if
        the input or the weight is. Under autocast the result has the autocast dtype. A sum over nothing (no
        channels, or no pixel but padding) is 0.

    Raises:
        RuntimeError: shapes that do not fit, another dtype (whole and complex numbers, too), mixed dtypes or
            devices, a sparse tensor.
        TypeError: a stride, padding, dilation or groups that is no whole number.

    LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998, §II.A.
    3×3 and 5×5 layers of stride 1 may use Winograd's minimal filtering (Lavin, Gray: Fast Algorithms for
    Convolutional Neural Networks, 2016, §4), which rounds otherwise: see `cuda_cnn.backends`.
    """
    if not is_dynamo_compiling():
        y = eager.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if y is not NotImplemented:
            return y
    if has_torch_function((input, weight, bias)):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(conv2d, (input, weight, bias), *arguments)
    _library.check_tensors("conv2d", ("bias",), input=input, weight=weight, bias=bias)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"conv2d: expected input of 3 (unbatched) or 4 (batched) dimensions, got {input.dim()} "
            f"(shape {list(input.shape)})"
        )
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if type(groups) is not int:
        (groups,) = _whole_numbers("groups", (groups,))
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if isinstance(padding, str):
        batched, padding = _pad(batched, weight, stride, padding, dilation)
    y = torch.ops.cuda_cnn.conv2d(batched, weight, bias, stride, _pair("padding", padding), dilation, groups)
    return y if input.dim() == 4 else y.squeeze(0)


def algorithm(
    direction: str,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mapped: bool = False,
    nchw: bool = False,
) -> str:
    """The algorithm that a CPU takes for "forward", "input_grad" or "weight_grad" of these sizes, or the kernel of a
    build with CUDA: "few_channels", "product 128x64, async, tensor cores".

    mapped: with the map of conv2d_fused on the load. nchw: of contiguous tensors, which a CPU's "gemm_nchw" takes as
    they lie."""
    operators = torch.ops.cuda_cnn
    sizes = list(input_shape), list(weight_shape)
    call = (direction, *sizes, stride, padding, dilation, groups, dtype, mapped)
    return (
        operators.conv2d_cuda_kernel(*call) if device == "cuda" else operators.conv2d_algorithm(*call, nchw)
    )


def _whole_numbers(name: str, values: Sequence[Any]) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not (
            isinstance(value, int | torch.SymInt) or hasattr(value, "__index__")
        ):
            raise TypeError(
                f"conv2d: expected {name} of whole numbers, got {type(value).__name__} ({value!r})"
            )
    return [value if isinstance(value, int | torch.SymInt) else value.__index__() for value in values]


def _pair(name: str, value: Any) -> list[int]:
    if type(value) is int:
        return [value, value]
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return list(value)
    if not isinstance(value, tuple | list):
        return _whole_numbers(name, (value,)) * 2
    if len(value) not in (1, 2):
        raise RuntimeError(f"conv2d: expected {name} of one or two numbers, got {list(value)}")
    return _whole_numbers(name, value) * (2 // len(value))


def _pad(
    x: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The input and the symmetric padding that stand for padding="same" or "valid"."""
    if padding == "valid" or weight.dim() != 4:  # the operator itself refuses another rank
        return x, [0, 0]
    if padding != "same":
        raise RuntimeError(f'conv2d: expected padding "same", "valid" or numbers, got {padding!r}')
    if stride != [1, 1]:
        raise RuntimeError(f'conv2d: expected stride 1 with padding "same", got {stride}')
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=False)]
    odd = [t % 2 for t in total]
    if any(odd):
        x = torch_functional.pad(x, (0, odd[1], 0, odd[0]))
    return x, [t // 2 for t in total]


def channels_last(*tensors: Tensor) -> bool:
    """Whether a result computed from these is channels_last: one of them is, and none is empty."""
    formats = [torch._prims_common.suggest_memory_format(t) for t in tensors]
    return torch.channels_last in formats and all(t.numel() > 0 for t in tensors[:1])


def _empty(like: Tensor, shape: Any, as_channels_last: bool) -> Tensor:
    format = torch.channels_last if as_channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


@torch.library.register_fake("cuda_cnn::conv2d")
def _(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Tensor:
    extents = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return _empty(x, (x.shape[0], weight.shape[0], *extents), channels_last(x, weight))


@torch.library.register_fake("cuda_cnn::conv2d_input_grad")
def _(dy: Tensor, weight: Tensor, size: Any, *rest: Any) -> Tensor:
    return _empty(dy, size, rest[-1])


@torch.library.register_fake("cuda_cnn::conv2d_weight_grad")
def _(dy: Tensor, x: Tensor, size: Any, *rest: Any) -> Tensor:
    return _empty(dy, size, rest[-1])


@torch.library.register_fake("cuda_cnn::conv2d_bias_grad")
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


# vmap: a batch of images is a larger batch, a batch of filters is more groups.


def _into_channels(tensor: Tensor, dim: int | None, batch_size: int, axis: int) -> Tensor:
    """A vmapped tensor (B, …) with B folded into its channels, those of one example side by side."""
    if dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.movedim(0, axis).flatten(axis, axis + 1)


@torch.library.register_vmap("cuda_cnn::conv2d")
def _(
    info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, int]:
    size, groups = info.batch_size, geometry[-1]
    in_x, in_weight, in_bias = in_dims[:3]
    late = None
    if in_weight is None and in_bias is not None:
        late, bias = bias.movedim(in_bias, 0)[:, None, :, None, None], None
    if in_weight is None:
        y, out_dim = torch.ops.cuda_cnn.conv2d(_library.fold_batch(x, in_x, size), weight, bias, *geometry), 0
    else:
        weight = _into_channels(weight, in_weight, size, 0)
        bias = None if bias is None else _into_channels(bias, in_bias, size, 0)
        if (
            in_x is not None or groups > 1
        ):  # else every example convolves the same image: more filters, no groups
            x, groups = _into_channels(x, in_x, size, 1), groups * size
        y, out_dim = torch.ops.cuda_cnn.conv2d(x, weight, bias, *geometry[:-1], groups), 1
    y = y.unflatten(out_dim, (size, -1))
    return (y, out_dim) if late is None else (y + late, out_dim)


@torch.library.register_vmap("cuda_cnn::conv2d_input_grad")
def _(info: Any, in_dims: tuple, dy: Tensor, weight: Tensor, size: Any, *rest: Any) -> tuple[Tensor, int]:
    *geometry, groups, as_channels_last = rest
    batch, (n, c, h, w) = info.batch_size, size
    if in_dims[1] is None:
        dy = _library.fold_batch(dy, in_dims[0], batch)
        dx = torch.ops.cuda_cnn.conv2d_input_grad(dy, weight, (batch * n, c, h, w), *rest)
        return dx.unflatten(0, (batch, n)), 0
    dy, weight = _into_channels(dy, in_dims[0], batch, 1), _into_channels(weight, in_dims[1], batch, 0)
    dx = torch.ops.cuda_cnn.conv2d_input_grad(
        dy, weight, (n, batch * c, h, w), *geometry, batch * groups, as_channels_last
    )
    return dx.unflatten(1, (batch, c)), 1


@torch.library.register_vmap("cuda_cnn::conv2d_weight_grad")
def _(info: Any, in_dims: tuple, dy: Tensor, x: Tensor, size: Any, *rest: Any) -> tuple[Tensor, int]:
    *geometry, groups, as_channels_last = rest
    batch, (k, c, r, s) = info.batch_size, size
    dy = _into_channels(dy, in_dims[0], batch, 1)
    if in_dims[1] is not None or groups > 1:
        x, groups = _into_channels(x, in_dims[1], batch, 1), groups * batch
    dw = torch.ops.cuda_cnn.conv2d_weight_grad(
        dy, x, (batch * k, c, r, s), *geometry, groups, as_channels_last
    )
    return dw.unflatten(0, (batch, k)), 0


@torch.library.register_vmap("cuda_cnn::conv2d_bias_grad")
def _(info: Any, in_dims: tuple, dy: Tensor) -> tuple[Tensor, int]:
    dy = _into_channels(dy, in_dims[0], info.batch_size, 1)
    return torch.ops.cuda_cnn.conv2d_bias_grad(dy).unflatten(0, (info.batch_size, -1)), 0


@register_flop_formula(torch.ops.cuda_cnn.conv2d)
def _(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return _flops(out_shape, weight)


@register_flop_formula(torch.ops.cuda_cnn.conv2d_input_grad)
def _(dy: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(dy, weight)


@register_flop_formula(torch.ops.cuda_cnn.conv2d_weight_grad)
def _(dy: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(dy, weight)


def _flops(y: Sequence[int], weight: Sequence[int]) -> int:
    """A multiplication and an addition for each output element and filter tap."""
    n, k, p, q = y
    return 2 * n * k * p * q * weight[1] * weight[2] * weight[3]
