"""Several processes that train one network: `torchrun --nproc-per-node=N -m cuda_cnn train …`.

Each takes its part of every batch. torch's DistributedDataParallel averages the gradients; this module holds
what is beside it: who is who, sums, shards, and batch normalisation over all parts of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import nn as layers

__all__ = ["SyncBatchNorm2d", "WorkerLostError", "Workers", "joined", "synchronise_batch_norm"]


class WorkerLostError(ConnectionError):
    """Another worker of the run has gone."""


@dataclass(frozen=True)
class Workers:
    """This process's place among those that train together."""

    rank: int = 0
    count: int = 1

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether one of them says so."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag), device=device)).item())

    def gather(self, value: object) -> list:
        """Every worker's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def shard(self, order: Tensor, batch_size: int) -> tuple[list[Tensor], list[int]]:
        """This worker's part of each batch of count·batch_size, and the size of the whole batch.

        Together the parts are the batches of one process with that batch size. A last batch with fewer
        pictures than workers is left out.
        """
        wholes = [batch for batch in order.split(batch_size * self.count) if len(batch) >= self.count]
        return [batch.tensor_split(self.count)[self.rank] for batch in wholes], list(map(len, wholes))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a broken connection is WorkerLostError."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
                raise
            raise WorkerLostError(
                f"worker {self.rank} of {self.count}: another worker has gone, so the run ends"
            ) from error


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Workers, torch.device]]:
    """This process's place under torchrun, and its device ("cuda" becomes the GPU of its rank); else alone.

    NCCL joins GPUs, gloo joins CPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), count), device
    finally:
        dist.destroy_process_group()


class SyncBatchNorm2d(layers.BatchNorm2d):
    """Batch normalisation whose mean and variance are those of all workers' parts of the batch.

    mean = Σ n_r·mean_r / N and var = Σ n_r·(var_r + (mean_r − mean)²) / N over the workers r; autograd follows
    both sums back. On any device, unlike `torch.nn.SyncBatchNorm`.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input, residual, relu=relu)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        n = x.new_tensor(x.numel() / x.shape[1])
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        total = _sum(n.detach().clone())
        mean_of_all = _sum(mean * n) / total
        var_of_all = _sum((var + (mean - mean_of_all).square()) * n) / total
        self._track(mean_of_all.detach(), var_of_all.detach() * (total / (total - 1)))
        scale = (var_of_all + self.eps).rsqrt()
        shift = -mean_of_all * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        y = (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(input.dtype)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """The sum over the workers; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


_sum = _Sum.apply


def synchronise_batch_norm(model: nn.Module) -> int:
    """Makes every batch normalisation of `model` a SyncBatchNorm2d, in place; returns their number."""
    norms = [m for m in model.modules() if type(m) is layers.BatchNorm2d]
    for norm in norms:
        norm.__class__ = SyncBatchNorm2d
    return len(norms)
