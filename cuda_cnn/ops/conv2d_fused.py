"""A convolution with batch normalisation living inside: a map on its load, an epilogue, its output's statistics.

Beside it the two passes that it leaves to be done: `channel_map` (scale, shift, residual, ReLU) and
`channel_statistics`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cuda_cnn.ops import _library
from cuda_cnn.ops import conv2d as _conv2d


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype that kernels compute a tensor's elements in, and that its vectors have."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _differentiated_twice() -> bool:
    """In a backward: whether its results will be differentiated again (create_graph=True)."""
    return torch.is_grad_enabled()


def _again(function: Any, inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The vector-Jacobian product of function at inputs by autograd, itself differentiable: the slow, sure way.

    Of views: one input may be computed from another, and that path is not ours.
    """
    views = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    wanted = [t for t in views if isinstance(t, Tensor) and t.requires_grad]
    pairs = [
        (o, g) for o, g in zip(function(*views), grads, strict=True) if g is not None and o.requires_grad
    ]
    outputs, vectors = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, vectors, create_graph=True, allow_unused=True))
    return [next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in views]


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    residual: Tensor | None,
    out_relu: bool,
    want_stats: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv2d_fused from operators that have derivatives of every order."""
    if in_scale is not None:
        x = (x.to(in_scale.dtype) * in_scale[:, None, None] + in_shift[:, None, None]).to(x.dtype)
    y = _library.ops.conv2d(x.relu() if in_relu else x, weight, bias, *geometry)
    if residual is not None:
        y = y + residual
    if out_relu:
        y = y.relu()
    if not want_stats:
        return y, *(y.new_empty(0, dtype=accumulator(y)) for _ in range(2))
    var, mean = torch.var_mean(y.to(accumulator(y)), (0, 2, 3), correction=0)
    return y, mean, var


class Conv2dFusedFunction(torch.autograd.Function):
    """(y, mean, var); without want_stats the last two are empty."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _library.below_autograd(_library.ops.conv2d_fused, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, in_scale, in_shift, in_relu, residual, out_relu, want_stats, *geometry = inputs
        y, mean, var = output
        ctx.set_materialize_grads(False)
        if not want_stats:
            ctx.mark_non_differentiable(mean, var)
        keep = y if out_relu or want_stats else None
        ctx.save_for_backward(x, weight, bias, in_scale, in_shift, keep, mean if want_stats else None)
        ctx.flags = in_relu, out_relu
        ctx.geometry = geometry
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, added: Tensor | None = None
    ) -> tuple:
        x, weight, _, in_scale, in_shift, y, mean = ctx.saved_tensors
        in_relu, out_relu = ctx.flags
        need = ctx.needs_input_grad
        if dy is None and dmean is None and dvar is None:
            return added, *(None,) * 12
        if _differentiated_twice():
            dx, *others = _conv2d_fused_again(ctx, dy, dmean, dvar)
            return dx if added is None or dx is None else dx + added, *others
        if dy is None:
            dy = torch.zeros_like(y)
        wants = [need[0], need[1], need[2], need[3] or need[4], need[6]]
        found = _library.ops.conv2d_fused_backward(
            *(dy, dmean, dvar, x, weight, in_scale, in_shift, in_relu, y, mean, out_relu),
            *ctx.geometry,
            wants,
            added,
        )
        dx, dweight, dbias, dscale, dshift, dresidual = found
        unchanged = dmean is None and dvar is None and not out_relu
        return (
            dx if need[0] else None,
            dweight if need[1] else None,
            dbias if need[2] else None,
            dscale if need[3] else None,
            dshift if need[4] else None,
            None,
            (dy if unchanged else dresidual) if need[6] else None,
            *(None,) * 6,
        )


class Conv2dFusedOfMapsFunction(Conv2dFusedFunction):
    """(y, mean, var, x): who reads x next reads it from here, and its gradient of x is added in this one's pass."""

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *Conv2dFusedFunction.forward(x, *arguments), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        Conv2dFusedFunction.setup_context(ctx, inputs, output[:3])


def _conv2d_fused_again(ctx: Any, g: Tensor | None, dmean: Tensor | None, dvar: Tensor | None) -> tuple:
    x, weight, bias, in_scale, in_shift, y, mean = ctx.saved_tensors
    in_relu, out_relu = ctx.flags
    count = 1 if y is None else y.numel() // max(y.shape[1], 1)
    g = torch.zeros_like(y) if g is None else g
    if dmean is not None:
        g = g + (dmean / count)[:, None, None].to(g.dtype)
    if dvar is not None:
        g = g + ((dvar * (2 / count))[:, None, None] * (y - mean[:, None, None])).to(g.dtype)
    if out_relu:
        g = g * (y > 0)

    def linear(x: Tensor, weight: Tensor, bias: Any, in_scale: Any, in_shift: Any) -> tuple:
        return composed(x, weight, bias, in_scale, in_shift, in_relu, None, False, False, *ctx.geometry)

    found = _again(linear, (x, weight, bias, in_scale, in_shift), (g, None, None))
    return *found, None, g if ctx.has_residual else None, *(None,) * 6


def conv2d_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    residual: Tensor | None = None,
    out_relu: bool = False,
    want_stats: bool = False,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Convolves a map that is scaled, shifted and rectified on its way into the kernel.

    .. math:: \hat x = \mathrm{relu}(s_c\,x + t_c), \quad y = \mathrm{relu}(w \star \hat x + b + \mathrm{residual})

    and, where asked for, the mean and the biased variance of each channel of y. With
    :math:`s = \gamma/\sqrt{\sigma^2 + \epsilon}` and :math:`t = \beta - \mu s` a batch normalisation in front of the
    convolution never exists in memory. Padding is zero after the map.

    Equivalent to: `x = F.relu(input * in_scale[:, None, None] + in_shift[:, None, None])`,
    `y = F.relu(F.conv2d(x, weight, bias, …) + residual)`, `torch.var_mean(y, (0, 2, 3), correction=0)`.

    Args:
        input: (N, C, H, W); float32, float64, bfloat16 or float16.
        weight: (K, C/groups, R, S), of the input's dtype, as bias and residual.
        bias: (K), or None.
        in_scale, in_shift: (C), float32 (float64 beside float64); both or none.
        in_relu, out_relu: whether each of the two rectifies.
        residual: as y, or None.
        want_stats: compute mean and variance.
        stride, padding, dilation, groups: as in `conv2d`.

    Returns:
        y (N, K, P, Q), channels_last; mean (K) and var (K) of in_scale's dtype, empty unless want_stats.
        All three are differentiable: the statistics add dmean/M + 2·dvar/M·(y − mean) to y's gradient, M = N·P·Q.
        Derivatives of every order are right; the second and later ones are composed from plain operators.

    Raises:
        RuntimeError: as `conv2d`; vectors of another length or dtype.

    Ioffe, Szegedy: Batch Normalization, 2015; Bulò, Porzi, Kontschieder: In-place activated BatchNorm, 2018, for
    what need not be kept.
    """
    dtype = _library.autocast_dtype(input)
    if dtype is not None:
        input, weight, bias, residual = (_library.cast(t, dtype) for t in (input, weight, bias, residual))
    geometry = (
        _conv2d._pair("stride", stride),
        _conv2d._pair("padding", padding),
        _conv2d._pair("dilation", dilation),
        groups,
    )
    tensors = (input, weight, bias, in_scale, in_shift)
    arguments = (*tensors, in_relu, residual, out_relu, want_stats, *geometry)
    if torch._C._are_functorch_transforms_active():
        return composed(*arguments)
    if not _library.needs_function(*tensors, residual):
        return _library.below_autograd(_library.ops.conv2d_fused, *arguments)
    return _library.apply(Conv2dFusedFunction, *arguments)


def conv2d_fused_of_maps(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_relu: bool,
    want_stats: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """conv2d_fused's (y, mean, var), and maps for whoever reads them next: the gradient of these is added in the pass
    that gives this convolution's, so that autograd has nothing to sum. For a dense block, whose maps have many
    readers.
    """
    tensors = (maps, weight, bias, in_scale, in_shift)
    arguments = (*tensors, in_relu, None, False, want_stats, *geometry)
    if not _library.needs_function(*tensors) or _library.autocast_dtype(maps) is not None:
        return *conv2d_fused(*arguments), maps
    stride, padding, dilation, groups = geometry
    pairs = (
        _conv2d._pair("stride", stride),
        _conv2d._pair("padding", padding),
        _conv2d._pair("dilation", dilation),
    )
    return _library.apply(Conv2dFusedOfMapsFunction, *arguments[:9], *pairs, groups)


# ---- Passes over maps --------------------------------------------------------------------------------------


def _composed_map(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    z = x.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        z = z + residual
    return (z.relu() if relu else z).to(x.dtype)


class ChannelMapFunction(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _library.below_autograd(_library.ops.channel_map, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, scale, shift, residual, ctx.relu = inputs
        ctx.has_residual = residual is not None
        # The ReLU's mask is found again from x, unless a residual went into it.
        ctx.save_for_backward(x, scale, shift, output if ctx.relu and ctx.has_residual else None)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple:
        x, scale, shift, z = ctx.saved_tensors
        need = ctx.needs_input_grad
        if _differentiated_twice():
            g = dz if z is None else dz * (z > 0)  # the mask is constant, residual or not

            def forward(x: Tensor, scale: Tensor, shift: Tensor) -> tuple:
                return (_composed_map(x, scale, shift, None, ctx.relu and z is None),)

            return *_again(forward, (x, scale, shift), (g,)), g if ctx.has_residual else None, None
        wants = [need[0], need[3] and ctx.relu]
        dx, dscale, dshift, dresidual = _library.ops.channel_map_backward(
            dz, x, scale, shift, z, ctx.relu, wants
        )
        return (
            dx if need[0] else None,
            dscale if need[1] else None,
            dshift if need[2] else None,
            (dresidual if ctx.relu else dz) if need[3] else None,
            None,
        )


def channel_map(
    input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    r"""One pass of :math:`z = \mathrm{relu}(s_c\,x + t_c + \mathrm{residual})`: the end of a residual block.

    Equivalent to: `F.relu(input * scale[:, None, None] + shift[:, None, None] + residual)`.

    Args:
        input: (N, C, H, W); residual as it. scale, shift: (C), float32 (float64 beside float64).

    Returns:
        (N, C, H, W), channels_last, of the input's dtype. Differentiable twice.
    """
    arguments = (input, scale, shift, residual, relu)
    if torch._C._are_functorch_transforms_active():
        return _composed_map(*arguments)
    if not _library.needs_function(input, scale, shift, residual):
        return _library.below_autograd(_library.ops.channel_map, *arguments)
    return _library.apply(ChannelMapFunction, *arguments)


class ChannelStatisticsFunction(torch.autograd.Function):
    """mean and biased variance: dx = dmean/M + 2·dvar/M·(x − mean), a channel_map of x."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _library.below_autograd(_library.ops.channel_statistics, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // max(x.shape[1], 1)
        scale = dvar * (2 / count)
        return channel_map(x, scale, dmean / count - mean * scale)


def channel_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, H, W), in float32 (float64 of float64).

    Equivalent to: `torch.var_mean(input, (0, 2, 3), correction=0)`, the other way round. Differentiable twice.
    """
    if torch._C._are_functorch_transforms_active():
        return torch.var_mean(input.to(accumulator(input)), (0, 2, 3), correction=0)[::-1]
    if not _library.needs_function(input):
        return _library.below_autograd(_library.ops.channel_statistics, input)
    return _library.apply(ChannelStatisticsFunction, input)


# ---- Traced code -------------------------------------------------------------------------------------------


def _nhwc(x: Tensor, shape: Any) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _vector(x: Tensor, size: Any) -> Tensor:
    return x.new_empty(size, dtype=accumulator(x))


@torch.library.register_fake("cuda_cnn::conv2d_fused")
def _(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_stats, stride, padding, dilation, _ = arguments[-5:]
    extents = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    size = weight.shape[0] if want_stats else 0
    return _nhwc(x, (x.shape[0], weight.shape[0], *extents)), _vector(x, size), _vector(x, size)


@torch.library.register_fake("cuda_cnn::conv2d_fused_backward")
def _(
    dy: Tensor, dmean: Any, dvar: Any, x: Tensor, weight: Tensor, in_scale: Any, in_shift: Any, in_relu: bool,
    y: Any, mean: Any, out_relu: bool, stride: Any, padding: Any, dilation: Any, groups: Any, wants: list[bool],
    added: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = x.new_empty(0)
    through_map = (wants[0] or wants[3]) and (in_scale is not None or in_relu)
    changed = dmean is not None or dvar is not None or out_relu
    return (
        _nhwc(x, x.shape) if wants[0] or wants[3] else none,
        torch.empty_like(weight) if wants[1] else x.new_empty(0),
        dy.new_empty(dy.shape[1]) if wants[2] else x.new_empty(0),
        _vector(x, x.shape[1] if through_map else 0),
        _vector(x, x.shape[1] if through_map else 0),
        _nhwc(dy, dy.shape) if wants[4] and changed else x.new_empty(0),
    )


@torch.library.register_fake("cuda_cnn::channel_map")
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Any, relu: bool) -> Tensor:
    return _nhwc(x, x.shape)


@torch.library.register_fake("cuda_cnn::channel_map_backward")
def _(dz: Tensor, x: Tensor, scale: Tensor, shift: Tensor, z: Any, relu: bool, wants: list[bool]) -> tuple:
    maps = [_nhwc(x, x.shape) if want else x.new_empty(0) for want in wants]
    return maps[0], _vector(x, x.shape[1]), _vector(x, x.shape[1]), maps[1]


@torch.library.register_fake("cuda_cnn::channel_statistics")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


@register_flop_formula(_library.ops.conv2d_packed)
@register_flop_formula(_library.ops.conv2d_fused)
def _(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return _conv2d._flops(out_shape[0], weight)


@register_flop_formula(_library.ops.conv2d_packed_)
def _(out: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _conv2d._flops(out, weight)


@register_flop_formula(_library.ops.conv2d_fused_backward)
def _(dy: Any, dmean: Any, dvar: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    wants = args[10]
    return ((wants[0] or wants[3]) + wants[1]) * _conv2d._flops(dy, weight)


_library.register_autograd("conv2d_fused", Conv2dFusedFunction)
_library.register_autograd("channel_map", ChannelMapFunction)
_library.register_autograd("channel_statistics", ChannelStatisticsFunction)
