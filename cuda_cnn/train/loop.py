"""The training loop: `Trainer(recipe, data, seed).fit(folder)`.

Repeatable: the order of the pictures and their random changes depend on (seed, epoch, step) alone, and every
other random state is in the checkpoint, so a run that was broken off continues to the same numbers.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..models import create_model
from ..models.registry import builder_parameters
from . import augmentation
from .checkpoint import CheckpointError, save_checkpoint, write_atomic
from .crops import centre_test
from .data import Data, ImageSet
from .diagnose import NonFiniteError, first_non_finite
from .optimisation import make_loss, make_optimizer, schedule_factor
from .progress import Progress
from .recipes import Recipe

__all__ = ["Evaluation", "Interrupted", "Trainer", "evaluate", "scores"]

LOG_FILE = "log.csv"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the checkpoint was written."""


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
) -> Evaluation:
    """Runs the network in eval mode over a data set. test: (network, images) to scores, one of crops.py's tests."""
    was_training = model.training
    model.eval()
    outputs, labels = [], []
    for images, target in batches(dataset, torch.arange(len(dataset)), batch_size):
        images = images.to(device)
        outputs.append((test(model, images) if test else scores(model, model(images))).cpu())
        labels.append(target)
    model.train(was_training)
    return Evaluation(torch.cat(outputs), torch.cat(labels))


def batches(
    dataset: Dataset, order: Tensor, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of `order`'s indices, batch by batch."""
    indices = [i for i in order.split(batch_size) if len(i)]
    if isinstance(dataset, ImageSet):
        return (dataset[i] for i in indices)
    return iter(DataLoader(dataset, batch_sampler=[i.tolist() for i in indices], num_workers=workers))


class Trainer:
    """Trains one network by a recipe.

    recipe.model is built for the data's classes and channels, with weights drawn from `seed`.
    """

    def __init__(self, recipe: Recipe, data: Data, seed: int = 0, device: str | torch.device = "cpu"):
        self.recipe, self.data, self.seed, self.device = recipe, data, seed, torch.device(device)
        self.model_args = {**model_arguments(recipe.model, data), **recipe.model_args}
        torch.manual_seed(seed)
        self.model = create_model(recipe.model, **self.model_args).to(self.device)
        self.loss = make_loss(recipe, self.model)
        self.augment = augmentation.build(recipe.augment)
        self.test = partial(centre_test, size=recipe.test_crop) if recipe.test_crop else None
        self.optimizer = make_optimizer(self.model.parameters(), recipe)
        schedule_factor(recipe, 0.0, [])
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0, 0]
        self.history: list[dict] = []
        self._stop = threading.Event()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.recipe.batch_size)

    def fit(self, folder: str | Path | None = None, progress: Progress | None = None) -> Evaluation:
        """Trains to the recipe's last epoch, a checkpoint in `folder` after each; returns the test's result.

        Ctrl-C and SIGTERM finish the step, save and raise Interrupted. Raises NonFiniteError on a NaN loss.
        """
        progress = progress or Progress(silent=True)
        with progress, self._stop_on_signals(), cpu_threads(self.recipe.threads):
            while self.epoch < self.recipe.epochs:
                progress.start(self.epoch, self.recipe.epochs, self.steps_per_epoch, self.step)
                self._train_epoch(folder, progress)
                result = evaluate(self.model, self.data.test, self.device, test=self.test)
                self._end_epoch(result, progress)
                self._save(folder)
        return evaluate(self.model, self.data.test, self.device, test=self.test)

    def _train_epoch(self, folder: str | Path | None, progress: Progress) -> None:
        self.model.train()
        order = torch.randperm(len(self.data.train), generator=self._generator(0))
        rest = order[self.step * self.recipe.batch_size :]
        for images, labels in batches(self.data.train, rest, self.recipe.batch_size):
            loss, correct = self._train_step(images, labels)
            self.step += 1
            self.sums = [
                self.sums[0] + loss * len(labels),
                self.sums[1] + correct,
                self.sums[2] + len(labels),
            ]
            progress.step(self.sums[0] / self.sums[2], self.sums[1] / self.sums[2])
            if self._stop.is_set():
                self._save(folder)
                raise Interrupted(f"stopped in epoch {self.epoch + 1}, step {self.step}")

    def _train_step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        done = (self.epoch * self.steps_per_epoch + self.step) / (self.recipe.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * schedule_factor(self.recipe, done, self.history)
        generator = self._generator(self.step + 1)
        for change in self.augment:
            images = change(images, generator)
        images, labels = images.to(self.device), labels.to(self.device)
        output = self.model(images)
        loss = self.loss(output, labels)
        if not math.isfinite(value := loss.item()):
            where = first_non_finite(self.model, images)
            raise NonFiniteError(
                f"the loss became {value} in epoch {self.epoch + 1}, step {self.step + 1}: "
                f"it comes from {where}. Try a smaller learning rate than {self.recipe.lr}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value, int((scores(self.model, output).argmax(1) == labels).sum())

    def _end_epoch(self, result: Evaluation, progress: Progress) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        row = {
            "epoch": self.epoch,
            "train_loss": self.sums[0] / self.sums[2],
            "train_accuracy": self.sums[1] / self.sums[2],
            "test_accuracy": result.accuracy,
        }
        self.sums = [0.0, 0, 0]
        self.history.append(row)
        progress.end_epoch(row)

    def state(self) -> dict:
        """All that a later `restore` needs to go on to the same numbers: plain types and tensors."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "model": self.recipe.model,
            "model_args": self.model_args,
            "classes": list(self.data.classes),
            "shape": list(self.data.shape),
            "data": self.data.name,
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken. Raises CheckpointError where it does not belong to this run."""
        if "optimizer" not in state:
            raise CheckpointError("this checkpoint holds weights alone: resume from checkpoint.pt")
        if state["classes"] != list(self.data.classes):
            raise CheckpointError(
                f"the checkpoint has classes {state['classes']}, the data {self.data.classes}"
            )
        try:
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
            self.history = state["history"]
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and state["random"]["cuda"]:
                torch.cuda.set_rng_state_all(state["random"]["cuda"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not belong to this run: {error}") from error

    def _save(self, folder: str | Path | None) -> None:
        if folder is not None:
            save_checkpoint(folder, self.state())
            rows = [self.history[0].keys(), *(row.values() for row in self.history)] if self.history else []
            table = "".join(",".join(map(str, row)) + "\n" for row in rows)
            write_atomic(Path(folder) / LOG_FILE, lambda file: file.write(table.encode()))

    def _generator(self, stream: int) -> torch.Generator:
        """Stream 0 of an epoch orders the pictures, stream s+1 changes those of step s."""
        mixed = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + stream
        return torch.Generator().manual_seed(mixed % 2**63)

    @contextmanager
    def _stop_on_signals(self):
        """A first Ctrl-C or SIGTERM ends the run after the current step; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, frame):
            self._stop.set()
            signal.signal(number, before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """That many threads inside; 0 keeps the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_arguments(name: str, data: Data) -> dict:
    """What a network must be told about the data: classes, channels, and letters where it draws letters."""
    accepted = builder_parameters(name)
    arguments = {"num_classes": len(data.classes), "in_chans": data.shape[0]}
    if "classes" in accepted and all(len(c) == 1 for c in data.classes):
        arguments["classes"] = "".join(data.classes)
    return arguments
