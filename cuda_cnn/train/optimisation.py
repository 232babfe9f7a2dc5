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
    "alexnet_sgd": lambda params, r: AlexNetSGD(params, r.lr, r.momentum, r.weight_decay),
    "adam": lambda params, r: optim.Adam(params, r.lr, weight_decay=r.weight_decay),
}

# Each maps how much of the run is done, 0 … 1, to a factor of the recipe's learning rate.
SCHEDULES = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}

LOSSES = {"cross_entropy": AuxiliaryCrossEntropy, "map": MAPLoss, "euclidean": EuclideanLoss}
PENALTY_LOSSES = (MAPLoss, EuclideanLoss)


def make_optimizer(params: Iterable[nn.Parameter], recipe: Recipe) -> optim.Optimizer:
    return _row(OPTIMIZERS, "optimizer", recipe.optimizer)(params, recipe)


def schedule_factor(recipe: Recipe, done: float) -> float:
    return _row(SCHEDULES, "schedule", recipe.schedule)(done)


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
