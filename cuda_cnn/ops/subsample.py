"""LeNet-5's trainable sub-sampling (LeCun et al. 1998, section II.B)."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cuda_cnn.ops import _library

AMPLITUDE = 1.7159  # of the paper's squashing function A·tanh(S·a), with S = 2/3
SLOPE = 2 / 3


class SubsampleFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, coefficient: Tensor, bias: Tensor, kernel_size: list[int], squash: str) -> Tensor:
        return _library.ops.subsample(x, coefficient, bias, kernel_size, squash)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, coefficient, _, *ctx.parameters = inputs
        ctx.save_for_backward(x, coefficient, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return *subsample_backward(dy, *ctx.saved_tensors, *ctx.parameters), None, None


class SubsampleBackwardFunction(torch.autograd.Function):
    """(dx, dcoefficient, dbias), as a function of dy, x, coefficient and y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, coefficient: Tensor, y: Tensor, kernel_size: list[int], squash: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _library.ops.subsample_backward(dy, x, coefficient, y, kernel_size, squash)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, kernel_size, squash = inputs
        ctx.save_for_backward(*tensors)
        ctx.parameters = kernel_size, squash

    @staticmethod
    def backward(ctx: Any, gdx: Tensor, gdcoefficient: Tensor, gdbias: Tensor) -> tuple:
        # Plain tensor arithmetic: autograd takes every further derivative by itself. With P the window
        # sum, Pᵀ its transpose, g(y) the squashing function's slope: da = dy·g(y), dx = Pᵀ(coefficient·da),
        # dcoefficient = Σ da·P(x), dbias = Σ da. So the gradients' product with what comes in is Σ da·q.
        dy, x, coefficient, y = ctx.saved_tensors
        (kernel_h, kernel_w), squash = ctx.parameters

        def window_sum(t: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(t, (kernel_h, kernel_w), divisor_override=1)

        def spread(t: Tensor) -> Tensor:
            t = t.repeat_interleave(kernel_h, -2).repeat_interleave(kernel_w, -1)
            return torch.nn.functional.pad(t, (0, x.shape[-1] - t.shape[-1], 0, x.shape[-2] - t.shape[-2]))

        def per_channel(t: Tensor) -> Tensor:
            return t[:, None, None]

        slope, curvature = slopes(y, squash)
        gathered = window_sum(gdx)
        q = (
            per_channel(coefficient) * gathered
            + per_channel(gdcoefficient) * window_sum(x)
            + per_channel(gdbias)
        )
        da = dy * slope
        every_but_channels = [d for d in range(x.dim()) if d != x.dim() - 3]
        return (
            slope * q,
            spread(da * per_channel(gdcoefficient)),
            (da * gathered).sum(every_but_channels),
            dy * curvature * q,
            None,
            None,
        )


def slopes(y: Tensor, squash: str) -> tuple[Tensor, Tensor]:
    """The squashing function's slope where its value is y, and the derivative of that for y."""
    if squash == "tanh":
        return SLOPE * (AMPLITUDE - y * y / AMPLITUDE), -2 * SLOPE / AMPLITUDE * y
    if squash == "sigmoid":
        return y * (1 - y), 1 - 2 * y
    return torch.ones_like(y), torch.zeros_like(y)


def subsample_backward(
    dy: Tensor, x: Tensor, coefficient: Tensor, y: Tensor, kernel_size: list[int], squash: str
) -> tuple[Tensor, Tensor, Tensor]:
    if not _library.needs_function(dy, x, coefficient, y):
        return _library.ops.subsample_backward(dy, x, coefficient, y, kernel_size, squash)
    return _library.apply(SubsampleBackwardFunction, dy, x, coefficient, y, kernel_size, squash)


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
    if has_torch_function((input, coefficient, bias)):
        return handle_torch_function(
            subsample, (input, coefficient, bias), input, coefficient, bias, kernel_size, squash
        )
    _library.check_tensors("subsample", input=input, coefficient=coefficient, bias=bias)
    if not input.dtype == coefficient.dtype == bias.dtype:
        dtype = torch.promote_types(torch.promote_types(input.dtype, coefficient.dtype), bias.dtype)
        input, coefficient, bias = input.to(dtype), coefficient.to(dtype), bias.to(dtype)
    window = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
    if not _library.needs_function(input, coefficient, bias):
        return _library.ops.subsample(input, coefficient, bias, window, squash)
    return _library.apply(SubsampleFunction, input, coefficient, bias, window, squash)


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
_library.register_autograd("subsample", SubsampleFunction)
_library.register_autograd("subsample_backward", SubsampleBackwardFunction)
