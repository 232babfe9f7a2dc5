"""What a recipe's words mean: optimisers, learning-rate schedules and losses, one row of a table each."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn, optim

from ..models.googlenet import AuxiliaryCrossEntropy
from ..models.lenet import EuclideanLoss, MAPLoss
from ..models.registry import nearest
from .optim import AlexNetSGD
from .recipes import Recipe

__all__ = ["LOSSES", "OPTIMIZERS", "SCHEDULES", "make_loss", "make_optimizer", "schedule_factor"]

OPTIMIZERS = {
    "sgd": lambda params, r: optim.SGD(params, r.lr, momentum=r.momentum, weight_decay=r.weight_decay),
    "nesterov": lambda params, r: optim.SGD(
        params, r.lr, momentum=r.momentum, weight_decay=r.weight_decay, nesterov=True
    ),
    "alexnet_sgd": lambda params, r: AlexNetSGD(params, r.lr, r.momentum, r.weight_decay),
    "adam": lambda params, r: optim.Adam(params, r.lr, weight_decay=r.weight_decay),
}


def constant(done: float, history: list[dict]) -> float:
    return 1.0


def cosine(done: float, history: list[dict]) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def steps(
    done: float, history: list[dict], at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1
) -> float:
    """A tenth from each of these parts of the run on: ResNet's and DenseNet's on CIFAR at a half and three quarters."""
    return factor ** sum(done >= part for part in at)


def plateau(
    done: float,
    history: list[dict],
    patience: int = 5,
    factor: float = 0.1,
    most: int = 3,
    least_gain: float = 0.01,
) -> float:
    """A tenth whenever the training loss has not fallen by `least_gain` of itself for `patience` epochs, `most` times
    (AlexNet and VGG watch the validation error; here the test set must not decide)."""
    best, waited, lowered = math.inf, 0, 0
    for row in history:
        if row["train_loss"] < best * (1 - least_gain):
            best, waited = row["train_loss"], 0
            continue
        waited += 1
        if waited >= patience and lowered < most:
            lowered, waited = lowered + 1, 0
    return factor**lowered


def decay(done: float, history: list[dict], every: int = 8, factor: float = 0.96) -> float:
    """This factor once more after every so many epochs (GoogLeNet: 4 % less every 8 epochs)."""
    return factor ** (len(history) // every)


# Each maps how much of the run is done, 0 … 1, and the epochs so far to a factor of the recipe's learning rate.
SCHEDULES = {"constant": constant, "cosine": cosine, "decay": decay, "plateau": plateau, "steps": steps}
WARM_UP_FROM = 0.1

LOSSES = {"cross_entropy": AuxiliaryCrossEntropy, "map": MAPLoss, "euclidean": EuclideanLoss}
PENALTY_LOSSES = (MAPLoss, EuclideanLoss)


def make_optimizer(params: Iterable[nn.Parameter], recipe: Recipe) -> optim.Optimizer:
    return _row(OPTIMIZERS, "optimizer", recipe.optimizer)(params, recipe)


def schedule_factor(recipe: Recipe, done: float, history: list[dict]) -> float:
    """The schedule's factor, after a warm-up that rises evenly from a tenth of the learning rate."""
    schedule = _row(SCHEDULES, "schedule", recipe.schedule)
    try:
        factor = schedule(done, history, **recipe.schedule_args)
    except TypeError as error:
        raise ValueError(f"schedule {recipe.schedule!r}: {error}") from error
    if done < recipe.warm_up:
        factor *= WARM_UP_FROM + (1 - WARM_UP_FROM) * done / recipe.warm_up
    return factor


def make_loss(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The recipe's loss. ValueError where it does not suit what the network gives (penalties or scores)."""
    loss = _row(LOSSES, "loss", recipe.loss)(**recipe.loss_args)
    penalties = getattr(model, "penalties", False)
    if penalties != isinstance(loss, PENALTY_LOSSES):
        gives = "penalties (smaller is better)" if penalties else "scores (larger is better)"
        raise ValueError(f"loss {recipe.loss!r} does not suit {recipe.model}, which gives {gives}")
    return loss


def _row(table: dict, what: str, name: str):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}{nearest(name, table)}")
    return table[name]
