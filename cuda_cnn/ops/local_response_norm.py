"""Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3)."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from cuda_cnn._C import eager
from cuda_cnn.ops import _library


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
    if not is_dynamo_compiling():
        y = eager.local_response_norm(input, size, alpha, beta, k)
        if y is not NotImplemented:
            return y
    if has_torch_function_unary(input):
        return handle_torch_function(local_response_norm, (input,), input, size, alpha, beta, k)
    _library.check_tensors("local_response_norm", input=input)
    if isinstance(size, float) or size is None:
        raise TypeError(f"local_response_norm: expected size to be an int, got {size!r}")
    return torch.ops.cuda_cnn.local_response_norm(input, size, alpha, beta, k)


@torch.library.register_fake("cuda_cnn::local_response_norm")
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _library.empty_like_result(x)


@torch.library.register_fake("cuda_cnn::local_response_norm_backward")
def _(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _library.empty_like_result(x)


@torch.library.register_vmap("cuda_cnn::local_response_norm")
def _(info: Any, in_dims: tuple, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
    x = _library.fold_batch(x, in_dims[0], info.batch_size)
    return torch.ops.cuda_cnn.local_response_norm(x, *parameters).unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("cuda_cnn::local_response_norm_backward")
def _(info: Any, in_dims: tuple, dy: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, int]:
    dy = _library.fold_batch(dy, in_dims[0], info.batch_size)
    x = _library.fold_batch(x, in_dims[1], info.batch_size)
    return torch.ops.cuda_cnn.local_response_norm_backward(dy, x, *parameters).unflatten(
        0, (info.batch_size, -1)
    ), 0
