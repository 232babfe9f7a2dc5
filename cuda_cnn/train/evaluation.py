"""What a network says about a data set, and how much of it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .data import ImageSet
from .workers import Workers

__all__ = ["Evaluation", "batches", "evaluate", "scores"]


@dataclass
class Evaluation:
    """Scores (N, K; larger is better) and right answers (N) of a data set."""

    scores: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        return (self.scores.argmax(1) == self.labels).double().mean().item()

    def confusion(self) -> Tensor:
        """(K, K) counts: row is the right class, column the predicted one."""
        k = self.scores.size(1)
        return torch.bincount(self.labels * k + self.scores.argmax(1), minlength=k * k).reshape(k, k)

    def worst(self, count: int) -> list[int]:
        """Indices of the mistakes, those first in which the right class is furthest behind the one chosen."""
        right = self.scores.gather(1, self.labels[:, None])[:, 0]
        behind = self.scores.amax(1) - right
        order = behind.argsort(descending=True, stable=True)[:count].tolist()
        return [i for i in order if self.scores[i].argmax() != self.labels[i]]


def scores(model: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A network's output as scores, larger is better: minus the penalties where it gives penalties; those of the
    main classifier, the first, where there are auxiliary ones."""
    output = output[0] if isinstance(output, tuple) else output
    return -output if getattr(model, "penalties", False) else output


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    test: Callable[[nn.Module, Tensor], Tensor] | None = None,
    loaders: int = 0,
    workers: Workers | None = None,
) -> Evaluation:
    """Runs the network in eval mode over a data set.

    test: (network, images) to scores, one of crops.py's tests. workers: each takes a part, all get the whole.
    """
    workers = workers or Workers()
    was_training = model.training
    model.eval()
    outputs, labels = [], []
    part = torch.arange(len(dataset)).tensor_split(workers.count)[workers.rank]
    for images, target in batches(dataset, part.split(batch_size), loaders):
        images = images.to(device)
        outputs.append((test(model, images) if test else scores(model, model(images))).cpu())
        labels.append(target)
    model.train(was_training)
    parts = workers.gather((outputs, labels))
    return Evaluation(
        *(torch.cat([t for part in column for t in part]) for column in zip(*parts, strict=True))
    )


def batches(dataset: Dataset, indices: list[Tensor], loaders: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of each tensor of indices, read by that many processes beside this one."""
    indices = [i for i in indices if len(i)]
    if isinstance(dataset, ImageSet):
        return (dataset[i] for i in indices)
    # A generator of its own: the loader's draws must not move the random state that a checkpoint restores.
    return iter(
        DataLoader(
            dataset, batch_sampler=[i.tolist() for i in indices], num_workers=loaders, generator=Generator()
        )
    )
