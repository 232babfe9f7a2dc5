"""Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3)."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from cuda_cnn.ops import _library


class LocalResponseNormFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return _library.ops.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *ctx.parameters = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        return local_response_norm_backward(dy, x, *ctx.parameters), None, None, None, None


class LocalResponseNormBackwardFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return _library.ops.local_response_norm_backward(dy, x, size, alpha, beta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        dy, x, *ctx.parameters = inputs
        ctx.save_for_backward(dy, x)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple:
        # Plain tensor arithmetic, so that autograd takes every further derivative by itself. With W the window
        # sum, Wᵀ its transpose, a = α/n, s = k + a·W(x²):  dx = s^−β·dy − 2aβ·x·Wᵀ(s^(−β−1)·x·dy).
        dy, x = ctx.saved_tensors
        size, alpha, beta, k = ctx.parameters
        a = alpha / size
        s = k + a * window_sum(x * x, size)
        p, q, r = s.pow(-beta), s.pow(-beta - 1), s.pow(-beta - 2)
        u = window_sum(gg * x, size)
        grad_dy = p * gg - 2 * a * beta * q * x * u
        grad_x = -2 * a * beta * (
            x * window_sum(q * gg * dy, size, transposed=True)
            + q * dy * u
            + gg * window_sum(q * x * dy, size, transposed=True)
        ) + 4 * a * a * beta * (beta + 1) * x * window_sum(r * x * dy * u, size, transposed=True)
        return grad_dy.to(dy.dtype), grad_x.to(x.dtype), None, None, None, None


def window_sum(t: Tensor, size: int, transposed: bool = False) -> Tensor:
    """Σ of t over channels c−⌊n/2⌋ … c+⌊(n−1)/2⌋ (transposed: the mirrored window), by differentiable slices."""
    above, below = size // 2, (size - 1) // 2
    if transposed:
        above, below = below, above
    channels = t.shape[1]
    padded = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (above, below))
    return sum((padded.narrow(1, j, channels) for j in range(1, size)), padded.narrow(1, 0, channels))


def local_response_norm_backward(
    dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    if not _library.needs_function(dy, x):
        return _library.ops.local_response_norm_backward(dy, x, size, alpha, beta, k)
    return LocalResponseNormBackwardFunction.apply(dy, x, size, alpha, beta, k)


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    r"""Normalises each value by the squares of its neighbours in the channel dimension.

    .. math:: y_c = x_c \Bigl(k + \frac{\alpha}{n} \sum_{j=c-\lfloor n/2 \rfloor}^{c+\lfloor (n-1)/2 \rfloor}
              x_j^2\Bigr)^{-\beta}

    Equivalent to: `F.local_response_norm(input, size, alpha, beta, k)`.

    Args:
        input: (N, C, *), three or more dimensions; float32, float64, bfloat16 or float16 (16-bit types compute in
            float32). contiguous and channels_last are both native.
        size: n, the number of channels in a window.
        alpha: α. The AlexNet paper does not divide by n: its α = 1e-4 is alpha = 5e-4 here, with size = 5.
        beta: β.
        k: k.

    Returns:
        Tensor of the input's shape, dtype and memory format. Under autocast the result is float32, as torch's.

    Raises:
        ValueError: fewer than three dimensions.
        RuntimeError: size < 1, a sparse tensor, or another dtype.

    Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, 2012, §3.3.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(local_response_norm, (input,), input, size, alpha, beta, k)
    _library.check_tensors("local_response_norm", input=input)
    if isinstance(size, float) or size is None:
        raise TypeError(f"local_response_norm: expected size to be an int, got {size!r}")
    if _library.autocast_dtype(input) is not None:
        input = _library.cast(input, torch.float32)
    if not _library.needs_function(input):
        return _library.ops.local_response_norm(input, size, alpha, beta, k)
    return LocalResponseNormFunction.apply(input, size, alpha, beta, k)


@torch.library.register_fake("cuda_cnn::local_response_norm")
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _library.empty_like_result(x)


@torch.library.register_fake("cuda_cnn::local_response_norm_backward")
def _(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _library.empty_like_result(x)


@torch.library.register_vmap("cuda_cnn::local_response_norm")
def _(info: Any, in_dims: tuple, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
    x = _library.fold_batch(x, in_dims[0], info.batch_size)
    return _library.ops.local_response_norm(x, *parameters).unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("cuda_cnn::local_response_norm_backward")
def _(info: Any, in_dims: tuple, dy: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
    dy = _library.fold_batch(dy, in_dims[0], info.batch_size)
    x = _library.fold_batch(x, in_dims[1], info.batch_size)
    return _library.ops.local_response_norm_backward(dy, x, *parameters).unflatten(
        0, (info.batch_size, -1)
    ), 0


_library.register_autograd("local_response_norm", LocalResponseNormFunction)
_library.register_autograd("local_response_norm_backward", LocalResponseNormBackwardFunction)
