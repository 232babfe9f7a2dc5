"""A 1×1 convolution and the training batch normalisation behind it, which keep nothing of the map between them.

With y = W·a at every pixel, everything that the gradients need of y is linear in a: with g the gradient behind the
normalisation and ⟨·⟩ sums over the M pixels,

    ⟨g yᵀ⟩'s diagonal  = rowsum(W ∘ G),   G = ⟨g aᵀ⟩, the weight gradient of g itself
    ⟨(y − μ) aᵀ⟩       = W·(⟨a aᵀ⟩ − M ā āᵀ)
    Wᵀ·diag(b)·(y − μ) = (Wᵀ diag(b) W)·(a − ā)

So the block's end, the widest map of a ResNet's bottleneck, is kept once (rectified) instead of twice. The two extra
products have C² multiply-adds a pixel beside the convolution's own C·K: cheap for C < K.
"""

from typing import Any

import torch
from torch import Tensor

from cuda_cnn.ops import _library
from cuda_cnn.ops.conv2d_fused import _again, _differentiated_twice, channel_map, composed

POINT = ([1, 1], [0, 0], [1, 1], 1)


def _normalised(
    fused: Any,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    in_relu: bool,
    relu: bool,
    eps: float,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = ([stride] * 2, *POINT[1:])
    y, mean, var = fused(x, weight, None, in_scale, in_shift, in_relu, None, False, True, *geometry)
    scale = (var + eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return channel_map(y, scale.to(mean.dtype), shift.to(mean.dtype), residual, relu), mean, var


class Conv2dNormFunction(torch.autograd.Function):
    """(z, mean, var) of z = relu(norm(W ⋆ relu(s·x + t)) + residual)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, var = _normalised(_library.ops.conv2d_fused, *arguments)
        *inputs, _, in_relu, relu, eps, stride = arguments
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, mean, var, z if relu else None)
        ctx.settings = in_relu, eps, stride
        ctx.count = z.numel() // z.shape[1]
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple:
        if dz is None:
            return (None,) * 11
        *inputs, mean, var, z = ctx.saved_tensors
        if _differentiated_twice():
            g = dz if z is None else dz * (z > 0)
            in_relu, eps, stride = ctx.settings

            def linear(*inputs: Any) -> tuple:
                return _normalised(composed, *inputs, None, in_relu, False, eps, stride)

            found = _again(linear, inputs, (g, None, None))
            return *found, g if ctx.needs_input_grad[6] else None, *(None,) * 4
        # z is None: no ReLU. Else the pass that masks dz sums it, too.
        if z is None:
            g, sum_g = dz, _library.ops.conv2d_bias_grad(dz).to(mean.dtype)
        else:
            *_, sum_g, g = _library.ops.channel_map_backward(dz, z, mean, mean, z, True, [False, True])
        found = _gradients(g, sum_g, *inputs, mean, var, ctx.count, *ctx.settings)
        results = (*found, g, *(None,) * 4)
        return tuple(r if need else None for r, need in zip(results, ctx.needs_input_grad, strict=True))


def _gradients(
    g: Tensor,
    sum_g: Tensor,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    in_relu: bool,
    eps: float,
    stride: int,
) -> tuple:
    """dx, dweight, din_scale, din_shift, dgamma, dbeta."""
    ops = _library.ops
    sampled = x if stride == 1 else x[:, :, ::stride, ::stride]
    channels, mapped = x.shape[1], in_scale is not None
    one = torch.ones(channels, dtype=mean.dtype, device=x.device)
    in_scale, in_shift = (in_scale, in_shift) if mapped else (one, torch.zeros_like(one))
    a = ops.channel_map(sampled, in_scale, in_shift, None, in_relu) if mapped or in_relu else sampled

    products = _products(g, a, weight.shape[0]).to(mean.dtype)
    gram, sum_a = _products(a, a, channels).to(mean.dtype), ops.conv2d_bias_grad(a).to(mean.dtype)
    w = weight[:, :, 0, 0].to(mean.dtype)
    inverse = (var + eps).rsqrt()
    dgamma = ((w * products).sum(1) - mean * sum_g) * inverse
    scale = inverse if gamma is None else inverse * gamma
    # dy = scale·g + offset + slope·(y − mean)
    slope, offset = -scale * inverse * dgamma / count, -scale * sum_g / count
    covariance = gram.addr_(sum_a, sum_a, alpha=-1 / count)
    sloped = slope[:, None] * w
    dweight = _times(sloped, covariance).addcmul_(scale[:, None], products).addr_(offset, sum_a)
    through = _products(_as_map(w), _as_map(sloped), channels)
    bias = (w * offset[:, None]).sum(0) - (through * (sum_a / count)[:, None]).sum(0)
    direct = ops.conv2d_input_grad(g, _filter(scale[:, None] * w, weight), a.shape, *POINT, True)
    dx = ops.conv2d_fused(
        *(a, _filter(through.T, weight), bias.to(x.dtype), None, None, False, direct, False, False), *POINT
    )[0]
    dscale = dshift = None
    if mapped or in_relu:
        dx, dscale, dshift, _ = ops.channel_map_backward(
            dx, sampled, in_scale, in_shift, None, in_relu, [True, False]
        )
    if stride != 1:
        whole = torch.zeros_like(x, memory_format=torch.channels_last)
        whole[:, :, ::stride, ::stride] = dx
        dx = whole
    return (
        dx,
        _filter(dweight, weight),
        dscale if mapped else None,
        dshift if mapped else None,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else sum_g.to(beta.dtype),
    )


def _products(rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """⟨rows columnsᵀ⟩ over the pixels of two maps, (count, C)."""
    shape = (count, columns.shape[1], 1, 1)
    return _library.ops.conv2d_weight_grad(rows, columns, shape, *POINT, False)[:, :, 0, 0]


def _times(matrix: Tensor, symmetric: Tensor) -> Tensor:
    """Their matrix product."""
    return _library.ops.conv2d(_as_map(matrix), _filter(symmetric, matrix), None, *POINT)[0, :, :, 0].T


def _as_map(matrix: Tensor) -> Tensor:
    """Rows as pixels, columns as channels."""
    return matrix.T[None, :, :, None]


def _filter(matrix: Tensor, like: Tensor) -> Tensor:
    """As a 1×1 filter of the weight's dtype."""
    return matrix.to(like.dtype)[:, :, None, None]


def conv2d_norm(
    input: Tensor,
    weight: Tensor,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A 1×1 convolution, normalised by the statistics of its own output, plus a residual, rectified.

    .. math:: y = w \star \mathrm{relu}(s_c x + t_c), \quad
              z = \mathrm{relu}\Bigl(\frac{y - \mu}{\sqrt{\sigma^2 + \epsilon}}\gamma + \beta + \mathrm{residual}\Bigr)

    Equivalent to `conv2d_fused(…, want_stats=True)`, then `channel_map`, but of both y and z only z is kept for the
    backward pass (nothing, without ReLU).

    Args:
        input: (N, C, H, W). weight: (K, C, 1, 1). in_scale, in_shift, in_relu: as in `conv2d_fused`.
        gamma, beta: (K), or None for 1 and 0. residual: as z, or None. stride: of both axes.

    Returns:
        z (N, K, P, Q), channels_last; mean and biased variance (K) of y, which carry no gradient: z's includes theirs.
    """
    dtype = _library.autocast_dtype(input)
    if dtype is not None:
        input, weight, residual = (_library.cast(t, dtype) for t in (input, weight, residual))
    tensors = (input, weight, in_scale, in_shift, gamma, beta, residual)
    arguments = (*tensors, in_relu, relu, eps, stride)
    if torch._C._are_functorch_transforms_active():
        return _normalised(composed, *arguments)
    if not _library.needs_function(*tensors):
        return _normalised(_library.ops.conv2d_fused, *arguments)
    return Conv2dNormFunction.apply(*arguments)
