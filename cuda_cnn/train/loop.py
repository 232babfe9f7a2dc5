"""The training loop: `Trainer(recipe, data, seed).fit(folder)`.

Repeatable: the order of the pictures and their random changes depend on (seed, epoch, step) alone, and every
other random state is in the checkpoint, so a run that was broken off continues to the same numbers.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import create_model
from ..models.registry import builder_parameters
from . import augmentation
from .checkpoint import CheckpointError, save_checkpoint
from .crops import centre_test
from .data import Data
from .diagnose import NonFiniteError
from .evaluation import Evaluation, batches, evaluate
from .logs import write_csv
from .optimisation import schedule_factor
from .progress import Progress
from .recipes import Recipe
from .step import Step
from .workers import Workers

__all__ = ["Interrupted", "Trainer"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the checkpoint was written."""


class Trainer:
    """Trains one network by a recipe.

    recipe.model is built for the data's classes and channels, with weights drawn from `seed`. workers: this
    process's place among several that train together; each takes batches of recipe.batch_size.

    Raises ValueError where recipe, network and data do not fit one another.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        seed: int = 0,
        device: str | torch.device = "cpu",
        workers: Workers | None = None,
    ):
        self.recipe, self.data, self.seed = recipe, data, seed
        self.workers = workers or Workers()
        self.model_args = {**model_arguments(recipe.model, data), **recipe.model_args}
        torch.manual_seed(seed)
        model = create_model(recipe.model, **self.model_args)
        self.device = getattr(model, "devices", [torch.device(device)])[0]
        self.augment = augmentation.build(recipe.augment, data.train)
        self.test = partial(centre_test, size=recipe.test_crop) if recipe.test_crop else None
        schedule_factor(recipe, 0.0, [])
        self._rehearse(model)
        self.optimise = Step(recipe, model, self.device, self.workers)
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0, 0]
        self.history: list[dict] = []
        self._stop = threading.Event()
        if self.workers.count > 1:  # the same weights, other dropout
            torch.manual_seed(self._mixed_seed(0, self.workers.rank))

    @property
    def model(self) -> nn.Module:
        """The network as it is to be used: with the running average of its weights, where there is one."""
        return self.optimise.trained

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.data.train), self.recipe.batch_size * self.workers.count)
        return whole + (rest >= self.workers.count)

    def fit(
        self,
        folder: str | Path | None = None,
        progress: Progress | None = None,
        log: Callable[[dict], None] | None = None,
        save_every: int = 0,
    ) -> Evaluation:
        """Trains to the recipe's last epoch, a checkpoint in `folder` after each; returns the test's result.

        log: called with each epoch's row. save_every: also a checkpoint after so many steps; 0: none.

        Ctrl-C and SIGTERM finish the step, save and raise Interrupted. Raises NonFiniteError on a NaN loss,
        WorkerLostError where another worker has gone: the last checkpoint is then whole.
        """
        progress, result = progress or Progress(silent=True), None
        with progress, self._stop_on_signals(), cpu_threads(self.recipe.threads), self.workers.watched():
            if self.workers.count > 1 and not self.epoch and not self.step:
                self._save(folder)  # a worker may be lost at any time
            while self.epoch < self.recipe.epochs:
                progress.start(self.epoch, self.recipe.epochs, self.steps_per_epoch, self.step)
                self._train_epoch(folder, progress, save_every)
                result = self.evaluate()
                row = self._end_epoch(result)
                progress.end_epoch(row)
                if log:
                    log(row)
                self._save(folder)
            return result or self.evaluate()

    def evaluate(self) -> Evaluation:
        """Of the test set, with the first worker's running statistics."""
        self.workers.follow_first(self.model.buffers())
        return evaluate(
            self.model,
            self.data.test,
            self.device,
            test=self.test,
            loaders=self.recipe.loaders,
            workers=self.workers,
        )

    def _train_epoch(self, folder: str | Path | None, progress: Progress, save_every: int) -> None:
        self.optimise.model.train()
        order = torch.randperm(len(self.data.train), generator=self._generator(0))
        done = self.step * self.recipe.batch_size * self.workers.count
        indices, sizes = self.workers.shard(order[done:], self.recipe.batch_size)
        for (images, labels), size in zip(
            batches(self.data.train, indices, self.recipe.loaders), sizes, strict=True
        ):
            result = self._train_step(images, labels, size)
            self.step += 1
            self.sums = [total + new for total, new in zip(self.sums, result, strict=True)]
            progress.step(self.sums[0] / self.sums[2], self.sums[1] / self.sums[2])
            if self.workers.any(self._stop.is_set(), self.device):
                self._save(folder)
                raise Interrupted(f"stopped in epoch {self.epoch + 1}, step {self.step}")
            if save_every and self.step % save_every == 0:
                self._save(folder)

    def _train_step(self, images: Tensor, labels: Tensor, of_all: int) -> tuple[float, int, int]:
        for group in self.optimise.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        generator = self._generator(self.step + 1, self.workers.rank)
        for change in self.augment:
            images = change(images, generator)
        try:
            return self.optimise(images, labels, of_all)
        except NonFiniteError as error:
            value, where = error.args
            raise NonFiniteError(
                f"the loss became {value} in epoch {self.epoch + 1}, step {self.step + 1}: "
                f"it comes from {where}. Try a smaller learning rate than {self.recipe.lr}."
            ) from None

    def _learning_rate(self) -> float:
        done = (self.epoch * self.steps_per_epoch + self.step) / (self.recipe.epochs * self.steps_per_epoch)
        return self.recipe.lr * schedule_factor(self.recipe, done, self.history)

    def _end_epoch(self, result: Evaluation) -> dict:
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": self.optimise.optimizer.param_groups[0]["lr"],
            "train_loss": self.sums[0] / self.sums[2],
            "train_accuracy": self.sums[1] / self.sums[2],
            "test_accuracy": result.accuracy,
        }
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0, 0]
        self.history.append(row)
        return row

    def state(self) -> dict:
        """All that a later `restore` needs to go on to the same numbers: plain types and tensors.

        Every worker must call it: their random states are gathered.
        """
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "model": self.recipe.model,
            "model_args": self.model_args,
            "classes": list(self.data.classes),
            "shape": list(self.data.shape),
            "levels": [list(level) for level in self.data.levels],
            "data": self.data.name,
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "workers": self.workers.count,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "random": self.workers.gather({"cpu": torch.get_rng_state(), "cuda": cuda}),
            **self.optimise.state(),
        }

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken. Raises CheckpointError where it does not belong to this run."""
        if "optimizer" not in state:
            raise CheckpointError("this checkpoint holds weights alone: resume from checkpoint.pt")
        if state["classes"] != list(self.data.classes):
            raise CheckpointError(
                f"the checkpoint has classes {state['classes']}, the data {self.data.classes}"
            )
        if (before := state.get("workers", 1)) != self.workers.count:
            raise CheckpointError(
                f"the checkpoint is of {before} worker(s), this run has {self.workers.count}: the batches would be "
                f"others. Start with: torchrun --nproc-per-node={before} -m cuda_cnn train …"
            )
        try:
            self.optimise.restore(state)
            self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
            self.history = state["history"]
            random = state["random"][self.workers.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and random["cuda"]:
                torch.cuda.set_rng_state_all(random["cuda"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not belong to this run: {error}") from error

    def _save(self, folder: str | Path | None) -> None:
        if folder is None:
            return
        state = self.state()
        if self.workers.rank == 0:
            save_checkpoint(folder, state)
            write_csv(folder, self.history)

    @torch.no_grad()
    def _rehearse(self, model: nn.Module) -> None:
        """One picture through augmentation and network, one through the test: what does not fit raises ValueError
        now, not hours later."""
        if not len(self.data.train) or not len(self.data.test):
            raise ValueError(f"{self.data.name}: no picture to train with, or none for the test")
        model.eval()
        image, seen = self.data.train[0][0][None], self.data.test[0][0][None]
        for change in self.augment:
            image = change(image, torch.Generator())
        for x, network in ((image, model), (seen, partial(self.test, model) if self.test else model)):
            try:
                shape = list(network(x).shape)
            except RuntimeError as error:
                raise ValueError(f"{self.recipe.model}: a picture of {list(x.shape[1:])}: {error}") from error
            if shape != [1, len(self.data.classes)]:
                raise ValueError(
                    f"{self.recipe.model} gives {shape} for one picture of {list(x.shape[1:])}, expected "
                    f"[1, {len(self.data.classes)}]: it needs pictures of another size"
                )
        model.train()

    def _generator(self, stream: int, rank: int = 0) -> torch.Generator:
        """Stream 0 of an epoch orders the pictures, stream s+1 changes those of step s, for each worker its own."""
        return torch.Generator().manual_seed(self._mixed_seed(stream, rank))

    def _mixed_seed(self, stream: int, rank: int) -> int:
        mixed = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + stream
        return (mixed + rank * 2**40) % 2**63

    @contextmanager
    def _stop_on_signals(self):
        """A first Ctrl-C or SIGTERM ends the run after the current step; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, frame):
            self._stop.set()
            if self.workers.count == 1:  # torchrun passes on a Ctrl-C that the workers have heard already
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
