"""Batch normalisation (Ioffe and Szegedy, 2015), with an optional residual and ReLU after it."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cuda_cnn.ops import _library


class BatchNormFunction(torch.autograd.Function):
    """(y, mean, var): in training the batch's mean and biased variance, in float64; else two empty tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        return _library.ops.batch_norm(
            x, residual, weight, bias, running_mean, running_var, training, eps, relu
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, residual, weight, bias, running_mean, running_var, training, eps, relu = inputs
        y, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        if not training:
            mean, var = running_mean, running_var
        # The ReLU's mask is recomputed from x, bit for bit, unless a residual went into it.
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, var)
        ctx.parameters = training, eps, relu
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple:
        if dy is None:
            return (None,) * 9
        x, y, weight, bias, mean, var = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        relu = ctx.parameters[2]
        wants = [need_x, need_weight or need_bias, need_residual and relu]
        dx, dweight, dbias, dresidual = batch_norm_backward(
            dy, x, y, weight, bias, mean, var, *ctx.parameters, wants
        )
        return (
            dx if need_x else None,
            (dresidual if relu else dy) if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 5,
        )


class BatchNormBackwardFunction(torch.autograd.Function):
    """(dx, dweight, dbias, dresidual); one that `wants` = [x, parameters, residual] does not name is empty.

    mean and var count as functions of x in training, and as constants otherwise.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        return _library.ops.batch_norm_backward(dy, x, y, weight, bias, mean, var, training, eps, relu, wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, training, eps, relu, wants = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.parameters = training, eps, relu, wants

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        grads = [g if g is not None and g.numel() else None for g in grads]
        return *double_backward(*grads, *ctx.saved_tensors, *ctx.parameters[:3]), *(None,) * 7


def double_backward(
    gdx: Tensor | None,
    gdweight: Tensor | None,
    gdbias: Tensor | None,
    gdresidual: Tensor | None,
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
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """Gradients for (dy, x, y, weight) of ⟨gdx, dx⟩ + ⟨gdweight, dweight⟩ + ⟨gdbias, dbias⟩ + ⟨gdresidual, dresidual⟩.

    With g = dy under the mask, s = 1/√(var + ε), x̂ = (x − mean)·s and the self-adjoint map
    P(v) = v − ⟨v⟩ − x̂·⟨v·x̂⟩ (P(v) = v outside training), where ⟨·⟩ is a channel's mean:
        dx = weight·s·P(g)      dweight = Σ g·x̂      dbias = Σ g      dresidual = g
    Plain tensor arithmetic, so that autograd takes every further derivative by itself.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // max(x.shape[1], 1)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(compute).view(-1, *[1] * (x.dim() - 2))

    def mean_of(t: Tensor) -> Tensor:
        return t.mean(dims, keepdim=True)

    g, values = dy.to(compute), x.to(compute)
    if training:
        var, mean = torch.var_mean(values, dims, correction=0, keepdim=True)
    else:
        mean, var = per_channel(mean), per_channel(var)
    scale = (var + eps).rsqrt()
    normalised = (values - mean) * scale
    gamma = 1 if weight is None else per_channel(weight)
    if relu:
        before = normalised * gamma + (0 if bias is None else per_channel(bias)) if y is None else y
        mask = (before > 0).to(compute)
        g = g * mask

    def project(t: Tensor) -> Tensor:
        return t - mean_of(t) - normalised * mean_of(t * normalised) if training else t

    grad_g, grad_x, grad_weight = torch.zeros_like(g), torch.zeros_like(g), None
    grad_normalised = torch.zeros_like(g)
    if gdx is not None:
        v = gdx.to(compute)
        projected = project(g)
        grad_g = grad_g + gamma * scale * project(v)
        overlap = (v * projected).sum(dims, keepdim=True)
        if weight is not None:
            grad_weight = (scale * overlap).reshape(weight.shape).to(weight.dtype)
        if training:
            through_mean = v * mean_of(g * normalised) + g * mean_of(v * normalised)
            grad_normalised = grad_normalised - gamma * scale * through_mean
            grad_x = grad_x - gamma * scale * scale * normalised * overlap / count
    if gdweight is not None:
        grad_g = grad_g + per_channel(gdweight) * normalised
        grad_normalised = grad_normalised + per_channel(gdweight) * g
    if gdbias is not None:
        grad_g = grad_g + per_channel(gdbias)
    if gdresidual is not None:
        grad_g = grad_g + gdresidual.to(compute)
    grad_x = grad_x + scale * project(grad_normalised)
    if relu:
        grad_g = grad_g * mask
    return grad_g.to(dy.dtype), grad_x.to(x.dtype), None, grad_weight


def batch_norm_backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _library.needs_function(dy, x, arguments[1]):
        return _library.ops.batch_norm_backward(dy, x, *arguments)
    return BatchNormBackwardFunction.apply(dy, x, *arguments)


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
    apply = BatchNormFunction.apply if _library.needs_function(*tensors) else _library.ops.batch_norm
    y, mean, var = apply(*arguments)
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
    return _library.empty_like_result(x), mean, var


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
        return _library.empty_like_result(x) if want else x.new_empty(0)

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
    return _vmapped(_library.ops.batch_norm, info, in_dims, arguments, 6)


@torch.library.register_vmap("cuda_cnn::batch_norm_backward")
def _(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    return _vmapped(_library.ops.batch_norm_backward, info, in_dims, arguments, 7)


_library.register_autograd("batch_norm", BatchNormFunction)
_library.register_autograd("batch_norm_backward", BatchNormBackwardFunction)
