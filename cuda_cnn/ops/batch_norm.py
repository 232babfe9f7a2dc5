"""Batch normalisation (Ioffe and Szegedy, 2015), with an optional residual and ReLU after it."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cuda_cnn._C import eager
from cuda_cnn.ops import _library


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    r"""Normalises each channel by its mean and variance; optionally adds a residual and rectifies, in the same pass.

    .. math:: y = \mathrm{relu}\Bigl(\frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}\,\gamma_c + \beta_c
              + \mathrm{residual}\Bigr)

    Equivalent to: `F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)`, then
    `F.relu(y + residual)` where asked for.

    Args:
        input: (N, C, *), two or more dimensions; float32, float64, bfloat16 or float16 (16-bit types compute in
            float32). contiguous and channels_last are both native.
        running_mean: (C,). In training it moves towards the batch's mean by `momentum`, in place (None: not kept);
            otherwise it is μ.
        running_var: (C,). Likewise with the variance: the batch's biased one normalises, its unbiased one is kept.
        weight: γ (C,), or None for 1. The input's dtype, or float32 beside a 16-bit input; so are the others.
        bias: β (C,), or None for 0.
        training: normalise by the statistics of this batch.
        momentum: the weight of this batch in the running statistics.
        eps: ε.
        residual: as input; added after normalisation.
        relu: rectify last.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value a channel in training, eps out of range, one of the running statistics without the other.
        RuntimeError: statistics missing outside training; sizes, dtypes or devices that do not match.
        IndexError: fewer than two dimensions.
        TypeError: what should be a tensor or a number is none.
        NotImplementedError: a sparse tensor, or one that is not of floating point.

    Ioffe, Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift, 2015.
    """
    if not is_dynamo_compiling():
        y = eager.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu
        )
        if y is not NotImplemented:
            return y
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            relu=relu,
        )
    named = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "residual"), tensors))
    _library.check_tensors("batch_norm", tuple(named)[1:], **named)
    if not isinstance(momentum, (int, float, torch.SymFloat)):
        raise TypeError(f"batch_norm: expected momentum to be a float, got {momentum!r}")
    _check(input, running_mean, running_var, training, eps)
    given = (None, None) if training else (running_mean, running_var)
    arguments = (input, residual, weight, bias, *given, training, eps, relu)
    y, mean, var = torch.ops.cuda_cnn.batch_norm(*arguments)
    if training and running_mean is not None and input.numel() > 0:
        count = input.numel() // input.shape[1]
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
    return y


def _check(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float
) -> None:
    if training and input.dim() > 0 and input.shape[0] * input.shape[2:].numel() == 1:
        raise ValueError(
            f"batch_norm: Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
        )
    if eps < 0 or (training and eps == 0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm: eps must be {wanted}, got {eps}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError(
            "batch_norm: running_mean and running_var must either both be None or neither be None"
        )
    if training and running_mean is not None:
        for name, values in (("running_mean", running_mean), ("running_var", running_var)):
            if input.dim() > 1 and values.numel() != input.shape[1]:
                raise RuntimeError(
                    f"batch_norm: expected {name} of {input.shape[1]} elements, one for each channel, "
                    f"got {values.numel()} (shape {list(values.shape)})"
                )


def _empty_result(x: Tensor) -> Tensor:
    """contiguous where x is, else channels_last where x is that, as torch's is where an extent of 1 leaves it open."""
    if torch._prims_common.is_contiguous_or_false(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 4 and torch._prims_common.is_channels_last_contiguous_or_false(x):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return _library.empty_like_result(x)


@torch.library.register_fake("cuda_cnn::batch_norm")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, values in (
        ("residual", residual),
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if values is not None and values.device != x.device:
            raise RuntimeError(f"batch_norm: expected {name} on {x.device} like input, got {values.device}")
    mean, var = (
        x.new_empty(x.shape[1] if training and x.dim() > 1 else 0, dtype=torch.float64) for _ in range(2)
    )
    return _empty_result(x), mean, var


@torch.library.register_fake("cuda_cnn::batch_norm_backward")
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like_input(want: bool) -> Tensor:
        return _empty_result(x) if want else x.new_empty(0)

    parameter = weight if weight is not None else bias if bias is not None else mean
    dweight, dbias = (parameter.new_empty(mean.shape if wants[1] else 0) for _ in range(2))
    return like_input(wants[0]), dweight, dbias, like_input(wants[2])


def _fold_channels(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    """A vmapped (B, N, C, …) as (N, B·C, …), a vmapped (B, C) as (B·C,): channels are independent of each other."""
    if tensor is None:
        return None
    channels = 0 if tensor.dim() - (dim is not None) == 1 else 1
    if dim is None:
        shape = list(tensor.shape)
        shape.insert(channels, batch_size)
        tensor = tensor.unsqueeze(channels).expand(shape)
    else:
        tensor = tensor.movedim(dim, channels)
    return tensor.flatten(channels, channels + 1)


def _unfold(tensor: Tensor, batch_size: int) -> tuple[Tensor, int]:
    if tensor.dim() == 1:
        return tensor.reshape(batch_size, -1), 0
    return tensor.unflatten(1, (batch_size, -1)), 1


def _vmapped(op: Any, info: Any, in_dims: tuple, arguments: tuple, tensors: int) -> tuple:
    folded = [
        _fold_channels(a, d, info.batch_size)
        for a, d in zip(arguments[:tensors], in_dims[:tensors], strict=True)
    ]
    results = op(*folded, *arguments[tensors:])
    return tuple(zip(*(_unfold(r, info.batch_size) for r in results), strict=True))


@torch.library.register_vmap("cuda_cnn::batch_norm")
def _(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    return _vmapped(torch.ops.cuda_cnn.batch_norm, info, in_dims, arguments, 6)


@torch.library.register_vmap("cuda_cnn::batch_norm_backward")
def _(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    return _vmapped(torch.ops.cuda_cnn.batch_norm_backward, info, in_dims, arguments, 7)
