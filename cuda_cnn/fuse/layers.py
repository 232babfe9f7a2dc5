"""What a fused graph calls: layers given as the modules they are, their parameters read when it runs."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cuda_cnn import functional as F
from cuda_cnn._C import eager
from cuda_cnn.models.densenet import _Append
from cuda_cnn.nn import BatchNorm2d
from cuda_cnn.ops import _library
from cuda_cnn.ops.conv2d_fused import accumulator, conv2d_fused_of_maps
from cuda_cnn.ops.conv2d_norm import conv2d_norm

Vectors = tuple[Tensor, Tensor]

# More rows are a product of matrices, which torch's BLAS has.
_LINEAR_ROWS = 16

# conv2d_norm's extra products are C/K + C/pixels of the backward pass: an eighth is the second term's share.
_PIXELS_A_CHANNEL = 8

# id of a module -> (what the values were made from, the values, the memory they were made from, the module):
# inference computes them once. Memory that is held is nobody else's, so its address stands for it. Read by
# csrc/eager_fuse.cpp.
_kept: dict[int, tuple[bytes, Any, list[Tensor], weakref.ref[nn.Module]]] = {}


def forget(module: nn.Module) -> None:
    _kept.pop(id(module), None)


def _keep(module: nn.Module, versions: bytes, values: Any, sources: Sequence[Tensor | None]) -> None:
    key = id(module)
    memory = [s.detach() for s in sources if s is not None]
    _kept[key] = versions, values, memory, weakref.ref(module, lambda _: _kept.pop(key, None))


def _fixed(sources: Sequence[Tensor | None]) -> bool:
    """Whether no gradients of these are wanted, which would need what is made from them anew every time."""
    return not torch.is_grad_enabled() or not any(s is not None and s.requires_grad for s in sources)


def _once(
    module: nn.Module, sources: Sequence[Tensor | None], settings: tuple, make: Callable[[], Any]
) -> Any:
    """make(), or what it gave last time if no source or setting has changed since. With gradients: anew every time.

    A write through `.data` goes unnoticed until the model changes its mode.
    """
    versions = eager.versions(*sources, *settings) if _fixed(sources) else None
    if versions is None:
        return make()
    kept = _kept.get(id(module))
    if kept is None or kept[0] != versions:
        with torch.inference_mode(False), torch.no_grad():
            _keep(module, versions, make(), sources)
    return _kept[id(module)][1]


def geometry(module: nn.Conv2d) -> tuple:
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.stride, padding, module.dilation, module.groups


def _nhwc(x: Tensor) -> Tensor:
    """Once, where the network begins; behind it everything is channels_last, slices of channels too."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


# ---- Normalisation -----------------------------------------------------------------------------------------


def follow(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics as torch's batch normalisation of x would."""
    count = x.numel() // max(x.shape[1], 1)
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    with torch.no_grad():
        momentum, unbiased = norm.momentum, count / (count - 1)
        statistics = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if eager.follow_batch(*statistics, mean, var, momentum, unbiased) is True:
            return
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches so far
            momentum = 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        norm.running_var.mul_(1 - momentum).add_(var, alpha=momentum * unbiased)


def normalise(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> Vectors:
    """scale and shift from the statistics of the batch x."""
    follow(norm, x, mean, var)
    return _vectors(norm, mean, var)


def _vectors(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> Vectors:
    vectors = eager.vectors(mean, var, norm.weight, norm.bias, norm.eps)
    if vectors is not NotImplemented:
        return vectors
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(scale.dtype)
    shift = mean * scale
    return scale, -shift if norm.bias is None else norm.bias.to(scale.dtype) - shift


def frozen(norm: nn.BatchNorm2d, x: Tensor) -> Vectors:
    """scale and shift from the running statistics."""
    vectors = eager.frozen(_kept, norm, x)
    if vectors is not NotImplemented:
        return vectors
    dtype = accumulator(x)
    sources = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    return _once(
        norm,
        sources,
        (float(norm.eps), dtype),
        lambda: _vectors(norm, norm.running_mean.to(dtype), norm.running_var.to(dtype)),
    )


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight and bias of the one convolution that does what both do, and the weight packed, where it stays."""
    sources = [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]

    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = accumulator(conv.weight)
        scale, shift = _vectors(norm, norm.running_mean.to(dtype), norm.running_var.to(dtype))
        weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, shift.to(weight.dtype), _pack(weight, conv.groups)

    return _once(conv, sources, (float(norm.eps),), make)


def _pack(weight: Tensor, groups: int) -> Tensor | None:
    """The weight as a CPU's kernels read it, unless it is about to change."""
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        return None
    if weight.is_inference() or not _fixed([weight]):
        return None
    return _library.ops.conv2d_pack(weight, groups)


def _weights(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and packed weight."""
    if norm is not None:
        return _folded(conv, norm)
    packed = _once(conv, [conv.weight], (), lambda: _pack(conv.weight, conv.groups))
    return conv.weight, conv.bias, packed


# ---- Convolutions ------------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    module: nn.Conv2d,
    norm: nn.BatchNorm2d | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    in_relu: bool = False,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(norm(conv(relu(scale·x + shift))) + residual), norm by its running statistics folded into the weight."""
    if norm is None and scale is None and residual is None and not (in_relu or relu):
        return F.conv2d(_nhwc(x), module.weight, module.bias, *geometry(module))
    y = eager.conv(_kept, x, module, norm, scale, shift, in_relu, residual, relu)
    if y is not NotImplemented:
        return y
    weight, bias, packed = _weights(module, norm)
    inside = residual is None or _could_be_added(residual, x, module)
    added = residual if inside else None
    if _inference(packed, x, weight, bias, scale, shift, added):
        operands = (_nhwc(x), weight, packed, bias, scale, shift, in_relu, added, relu and inside)
        y = _library.below_autograd(_library.ops.conv2d_packed, *operands, *geometry(module))
    else:
        operands = (_nhwc(x), weight, bias, scale, shift, in_relu, added, relu and inside, False)
        y, *_ = F.conv2d_fused(*operands, *geometry(module))
    return y if inside else _sum(y, residual, relu)


def _inference(packed: Tensor | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the packed weight serves: no derivative is wanted, and no other precision."""
    return (
        packed is not None and not _library.needs_function(x, *others) and _library.autocast_dtype(x) is None
    )


def linear(x: Tensor, module: nn.Linear, relu: bool = False) -> Tensor:
    """relu(linear(x)). On a CPU a few rows are so many images of one pixel: the convolution's kernels read the weight
    once, where it lies, at the memory's pace, forwards and backwards."""
    few = x.dim() == 2 and x.device.type == "cpu" and 0 < len(x) <= _LINEAR_ROWS
    # Not an integer, a complex number or eight bits; nor a subclass, as quantised weights are.
    usual = x.is_floating_point() and x.element_size() > 1 and type(module.weight) in (nn.Parameter, Tensor)
    if few and usual:
        weight = module.weight[:, :, None, None]
        y, *_ = F.conv2d_fused(x[:, :, None, None], weight, module.bias, out_relu=relu)
        return y.flatten(1)
    y = nn.functional.linear(x, module.weight, module.bias)
    return y.relu() if relu else y


def _could_be_added(residual: Tensor, x: Tensor, module: nn.Conv2d) -> bool:
    """Whether the sum is the plain one of a residual block: no broadcast, no other dtype."""
    if residual.dtype != x.dtype or residual.dim() != 4 or residual.shape[1] != module.out_channels:
        return False
    (stride, padding, dilation, _), kernel = geometry(module), module.kernel_size
    extents = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return list(residual.shape) == [x.shape[0], module.out_channels, *extents]


def _sum(y: Tensor, residual: Tensor, relu: bool) -> Tensor:
    return (y + residual).relu() if relu else y + residual


def conv_with_statistics(
    x: Tensor,
    module: nn.Conv2d,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    in_relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) of conv(relu(scale·x + shift))."""
    return F.conv2d_fused(
        *(_nhwc(x), module.weight, module.bias, scale, shift, in_relu, None, False, True), *geometry(module)
    )


def conv_of_maps(
    maps: Tensor,
    module: nn.Conv2d,
    scale: Tensor | None,
    shift: Tensor | None,
    in_relu: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, var) of conv(relu(scale·maps + shift)), and a dense block's maps for their next reader."""
    return conv2d_fused_of_maps(
        *(maps, module.weight, module.bias, scale, shift, in_relu, want_stats), *geometry(module)
    )


def conv_norm(
    x: Tensor,
    module: nn.Conv2d,
    norm: nn.BatchNorm2d,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    in_relu: bool = False,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(norm(conv(relu(scale·x + shift))) + residual) in training, of a 1×1 convolution."""
    # In 16 bits the products that stand for the map between would be rounded too early; on few pixels they cost
    # more than the convolution, and the map is small.
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // module.stride[0] ** 2
    worthwhile = pixels >= _PIXELS_A_CHANNEL * module.in_channels
    exact = x.element_size() > 2 and _library.autocast_dtype(x) is None
    if not worthwhile or not exact or (residual is not None and not _could_be_added(residual, x, module)):
        y, mean, var = conv_with_statistics(x, module, scale, shift, in_relu)
        return apply(y, *normalise(norm, y, mean, var), residual, relu)
    z, mean, var = conv2d_norm(
        *(_nhwc(x), module.weight, scale, shift, in_relu, norm.weight, norm.bias, norm.eps),
        *(residual, relu, module.stride[0]),
    )
    follow(norm, z, mean, var)
    return z


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """relu(norm(x) + residual) by the batch's statistics, kept for the backward pass."""
    x = _nhwc(x)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return _sum(BatchNorm2d.forward(norm, x), residual, relu)
    return BatchNorm2d.forward(norm, x, residual, relu=relu)


def apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """relu(scale·x + shift + residual)."""
    x = _nhwc(x)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return _sum(F.channel_map(x, scale, shift), residual, relu)
    return F.channel_map(x, scale, shift, residual, relu)


def statistics(x: Tensor) -> Vectors:
    return F.channel_statistics(_nhwc(x))


def max_pool(x: Tensor, module: nn.MaxPool2d) -> Tensor:
    window = module.kernel_size, module.stride, module.padding, module.dilation
    return F.max_pool2d(x, *window, ceil_mode=module.ceil_mode)


# ---- Dense blocks ------------------------------------------------------------------------------------------


def append_conv(
    maps: Tensor,
    buffer: Tensor,
    x: Tensor,
    module: nn.Conv2d,
    norm: nn.BatchNorm2d | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    in_relu: bool = False,
    relu: bool = False,
) -> Tensor:
    """append() of relu(norm(conv(relu(scale·x + shift)))), which in inference is computed where it is to lie."""
    y = eager.append_conv(_kept, maps, buffer, x, module, norm, scale, shift, in_relu, relu)
    if y is not NotImplemented:
        return y
    weight, bias, packed = _weights(module, norm)
    if not _inference(packed, x, weight, bias, scale, shift, maps) or x.dtype != buffer.dtype:
        return append(maps, conv(x, module, norm, scale, shift, in_relu, None, relu), buffer)
    first, end = maps.shape[1], maps.shape[1] + module.out_channels
    operands = (_nhwc(x), weight, packed, bias, scale, shift, in_relu, None, relu)
    _library.below_autograd(_library.ops.conv2d_packed_, buffer[:, first:end], *operands, *geometry(module))
    return buffer[:, :end]


def append(maps: Tensor | None, new: Tensor, buffer: Tensor) -> Tensor:
    """The buffer's channels up to `new`, which is written behind `maps`."""
    return _Append.apply(maps, new, buffer)
