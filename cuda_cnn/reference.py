"""Each operator in its plainest form: the formula, in loops over what is small, in tensor arithmetic otherwise.

For tests and benchmarks. Everything is differentiable by autograd, and as exact as the dtype that it is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["batch_norm", "concat", "conv2d", "conv2d_fused", "local_response_norm", "max_pool2d", "subsample"]


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """y_c = x_c · (k + α/n · Σ_j x_j²)^−β over the channels j from c − ⌊n/2⌋ to c + ⌊(n−1)/2⌋."""
    channels = []
    for c in range(x.shape[1]):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        scale = k + alpha / size * window.square().sum(dim=1)
        channels.append(x[:, c] * scale.pow(-beta))
    return torch.stack(channels, dim=1)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """y_kpq = b_k + Σ_crs w_kcrs · x_{c, p·stride + r·dilation − padding, …}, a filter tap at a time."""
    (n, _, *size), (outputs, channels, *taps) = x.shape, weight.shape
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    extents = [(size[i] + 2 * padding[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    x = x.unflatten(1, (groups, channels))
    weight = weight.unflatten(0, (groups, outputs // groups))
    y = x.new_zeros(n, groups, outputs // groups, *extents)
    for r in range(taps[0]):
        for s in range(taps[1]):
            rows, columns = (
                slice(tap * dilation[i], tap * dilation[i] + (extents[i] - 1) * stride[i] + 1, stride[i])
                for i, tap in enumerate((r, s))
            )
            y = y + torch.einsum("ngcpq,gkc->ngkpq", x[..., rows, columns], weight[..., r, s])
    y = y.flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


def conv2d_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_relu: bool = False,
    residual: Tensor | None = None,
    out_relu: bool = False,
    *geometry: int | tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var): x̂ = relu(s_c · x + t_c), y = relu(w ⋆ x̂ + b + residual), and y's statistics."""
    if in_scale is not None:
        x = x * in_scale[:, None, None] + in_shift[:, None, None]
    y = conv2d(x.relu() if in_relu else x, weight, bias, *geometry)
    if residual is not None:
        y = y + residual
    if out_relu:
        y = y.relu()
    mean = y.mean((0, 2, 3))
    return y, mean, (y - mean[:, None, None]).square().mean((0, 2, 3))


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """y_pq = max_rs x_{p·stride + r·dilation − padding, …}: of equal ones the first, but the last NaN."""
    kernel, pad, step = _pair(kernel_size), _pair(padding), _pair(dilation)
    stride = kernel if stride is None else _pair(stride)
    extents = []
    for size, k, s, p, d in zip(x.shape[-2:], kernel, stride, pad, step, strict=True):
        last_start = size + p - d * (k - 1) - 1  # of a whole window, counted from the first padding cell
        extent = (last_start + p) // s + 1
        # With ceil_mode one more, if a cell is left over and the window does not start in the right padding.
        extents.append(extent + (ceil_mode and (last_start + p) % s != 0 and extent * s < size + p))
    # Enough −inf on every side for any window.
    reach = [(e - 1) * s + d * (k - 1) + 1 for e, s, d, k in zip(extents, stride, step, kernel, strict=True)]
    right, below = (max(reach[i] - x.shape[i - 2] - pad[i], 0) for i in (1, 0))
    x = torch.nn.functional.pad(x, (pad[1], right, pad[0], below), value=float("-inf"))
    best = x.new_full((*x.shape[:-2], *extents), float("-inf"))
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            rows, columns = (
                slice(t * step[i], t * step[i] + (extents[i] - 1) * stride[i] + 1, stride[i])
                for i, t in enumerate((r, s))
            )
            cell = x[..., rows, columns]
            best = torch.where((cell > best) | cell.isnan(), cell, best)
    return best


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Each tensor copied to its place."""
    dim %= tensors[0].dim()
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    out, start = tensors[0].new_zeros(shape), 0
    for t in tensors:
        out = out.slice_scatter(t, dim, start, start + t.shape[dim])
        start += t.shape[dim]
    return out


def subsample(
    x: Tensor, coefficient: Tensor, bias: Tensor, kernel_size: int | Sequence[int] = 2, squash: str = "tanh"
) -> Tensor:
    """y = f(coefficient_c · Σ window + bias_c), f(a) = 1.7159·tanh(2a/3), a sigmoid or a."""
    kernel_h, kernel_w = _pair(kernel_size)
    height, width = x.shape[-2] // kernel_h * kernel_h, x.shape[-1] // kernel_w * kernel_w
    total = sum(x[..., r:height:kernel_h, s:width:kernel_w] for r in range(kernel_h) for s in range(kernel_w))
    a = coefficient[:, None, None] * total + bias[:, None, None]
    return {"tanh": lambda a: 1.7159 * torch.tanh(2 / 3 * a), "sigmoid": torch.sigmoid, "none": lambda a: a}[
        squash
    ](a)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """y_c = (x_c − μ_c) / √(σ²_c + ε) · γ_c + β_c (+ residual, ReLU), μ and σ² of the batch or the running ones."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims) if training else running_mean
    var = x.var(dims, correction=0) if training else running_var
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    mean, var, weight, bias = (t.view(-1, *[1] * (x.dim() - 2)) for t in (mean, var, weight, bias))
    y = (x - mean) / (var + eps).sqrt() * weight + bias
    if residual is not None:
        y = y + residual
    return y.clamp(min=0) if relu else y
