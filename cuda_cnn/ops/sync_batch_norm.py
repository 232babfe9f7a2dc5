"""Batch normalisation whose batch is spread over the processes of a group: `torch.nn.SyncBatchNorm`'s protocol.

Each process takes the statistics of its own images, in float64; the group shares them with their counts, and each
normalises by the joint ones. Going back, the group adds up the two sums over a channel that dx needs. dweight and
dbias stay those of the process's own images: DistributedDataParallel averages them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cuda_cnn.ops import _library


class SyncBatchNormFunction(torch.autograd.Function):
    """(y, mean, var, count): the joint mean and biased variance, float64, and the number of values of a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = joint_statistics(x, eps, group)
        y = _normalise(x, None, weight, bias, mean, var, eps)
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple:
        arguments = (dy, *ctx.saved_tensors, ctx.eps, ctx.group)
        dx, dweight, dbias = SyncBatchNormBackwardFunction.apply(*arguments)
        wanted = zip(ctx.needs_input_grad, (dx, dweight, dbias), strict=False)
        return *(grad if want else None for want, grad in wanted), None, None


class SyncBatchNormBackwardFunction(torch.autograd.Function):
    """(dx, dweight, dbias). With g = dy and the sums Σ over all processes' images:
    dx = weight·s·(g − Σg/M − x̂·Σ(g·x̂)/M), the last two terms as one more affine map of x̂."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gamma = torch.ones_like(mean) if weight is None else weight
        gamma = gamma.to(_parameter_dtype(x))
        arguments = (mean, var, False, eps, False, [True, True, False])
        own, dweight, dbias, _ = _library.ops.batch_norm_backward(dy, x, None, gamma, gamma, *arguments)
        sums = torch.stack((dweight, dbias)).to(torch.float64)
        dist.all_reduce(sums, group=group)
        scale, shift = ((-sums / count) * gamma * (var + eps).rsqrt()).to(_parameter_dtype(x))
        dx = _normalise(x, own, scale, shift, mean, var, eps)
        return dx, *(d if p is None else d.to(p.dtype) for d, p in ((dweight, weight), (dbias, bias)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError("sync_batch_norm: a second derivative across processes is not implemented")


def joint_statistics(x: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes' images, and the number of values of one."""
    channels = x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel() > 0:
        _, own[:channels], own[channels:-1] = _library.ops.batch_norm(
            x, None, None, None, None, None, True, eps, False
        )
        own[-1] = x.numel() // channels
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    every = torch.stack(every)
    means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, var, count


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """`F.batch_norm(…, training=True)` as if the images of all processes of the group were one batch.

    Every process must call it, also one without images. First derivatives only.

    Equivalent to: `torch.nn.SyncBatchNorm` in training, on a GPU; this also runs on a CPU.
    """
    y, mean, var, count = SyncBatchNormFunction.apply(input, weight, bias, eps, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(var * (count / (count - 1)), alpha=momentum)
    return y


def _normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    dtype = _parameter_dtype(x)
    arguments = (x, residual, weight, bias, mean.to(dtype), var.to(dtype), False, eps, False)
    return _library.ops.batch_norm(*arguments)[0]


def _parameter_dtype(x: Tensor) -> torch.dtype:
    """float32 beside a 16-bit input, else the input's."""
    return torch.promote_types(x.dtype, torch.float32)
