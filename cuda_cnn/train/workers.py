"""Several processes that train one network: `torchrun --nproc-per-node=N -m cuda_cnn train …`.

Each takes its part of every batch. torch's DistributedDataParallel averages the gradients; this module holds
what is beside it: who is who, sums and shards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import nn as layers

__all__ = ["WorkerLostError", "Workers", "joined", "synchronise_batch_norm"]


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

    def follow_first(self, tensors: Iterable[Tensor]) -> None:
        """The first worker's values for all, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def shard(self, order: Tensor, batch_size: int) -> tuple[list[Tensor], list[int]]:
        """This worker's part of each batch of count·batch_size, and the size of the whole batch.

        Together the parts are the batches of one process with that batch size. A last batch with fewer
        pictures than workers is left out.
        """
        wholes = [batch for batch in order.split(batch_size * self.count) if len(batch) >= self.count]
        return [batch.tensor_split(self.count)[self.rank] for batch in wholes], list(map(len, wholes))

    def part(self, device: torch.device) -> None:
        """All are at their end: none breaks another's exchange by leaving."""
        if self.count > 1:
            with self.watched():
                dist.barrier(device_ids=None if device.index is None else [device.index])

    @staticmethod
    def leave(status: int) -> NoReturn:
        """Ends this process at once: an exchange's thread that frees a tensor while Python ends would abort it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

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


def synchronise_batch_norm(model: nn.Module) -> int:
    """Batch normalisations, in place, over all workers' parts of a batch; returns their number."""
    norms = [m for m in model.modules() if type(m) is layers.BatchNorm2d]
    for norm in norms:
        norm.__class__, norm.process_group = layers.SyncBatchNorm, None
    return len(norms)
