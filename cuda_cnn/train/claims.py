"""The papers' claims, run again at small scale: each trains a few forms of a network with several seeds and
compares.

A claim is one row of CLAIMS. Its forms differ in nothing but what the claim is about, and have the same
recipe.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import Data, ImageSet
from .diagnose import NonFiniteError
from .loop import Trainer
from .progress import Progress
from .recipes import Recipe, load_recipe

__all__ = ["CLAIMS", "Claim", "Outcome", "reproduce"]


@dataclass
class Run:
    """One training: the network's size, the epochs' rows, and what was trained."""

    parameters: int
    history: list[dict]
    trainer: Trainer

    def loss(self) -> float:
        return self.history[-1]["train_loss"]

    def test_error(self) -> float:
        return 1 - self.history[-1]["test_accuracy"]

    def epochs_to_error(self, error: float) -> float:
        """Epochs until the training error, an epoch's mean, is down to this, interpolated; else all of
        them."""
        before = 1.0
        for epoch, row in enumerate(self.history):
            now = 1 - row["train_accuracy"]
            if now <= error:
                return epoch + (before - error) / max(before - now, 1e-9)
            before = now
        return float(len(self.history))


@dataclass
class Claim:
    """text: what the paper says. forms: each one's name and model arguments, beyond the recipe's.
    measure: the number that is compared, in words `unit`. seen: whether the forms' measures, a list of one a
    seed, show the claim.
    learning_rates: each form is trained with each, and has the one whose mean measure is least, as the paper
    chose it for each form; none: the recipe's."""

    text: str
    paper: str
    recipe: Recipe
    forms: dict[str, dict]
    measure: Callable[[Run], float]
    unit: str
    seen: Callable[[dict[str, list[float]]], bool]
    side: int = 32  # pictures are averaged down to this
    learning_rates: tuple[float, ...] = ()

    def mean(self, runs: list[Run]) -> float:
        return statistics.fmean(map(self.measure, runs))


@dataclass
class Outcome:
    claim: Claim
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def measures(self) -> dict[str, list[float]]:
        return {form: [self.claim.measure(run) for run in runs] for form, runs in self.runs.items()}

    @property
    def seen(self) -> bool:
        return self.claim.seen(self.measures())

    def lines(self) -> list[str]:
        rows = [f"{self.claim.text} ({self.claim.paper})"]
        for form, values in self.measures().items():
            each = ", ".join(f"{value:.4g}" for value in values)
            run = self.runs[form][0]
            rate = f", best learning rate {run.trainer.recipe.lr:g}" if self.claim.learning_rates else ""
            rows.append(
                f"  {form:28} {statistics.fmean(values):10.4g}   ({each})   {run.parameters:,} parameters{rate}"
            )
        rows.append(f"  ({self.claim.unit})")
        rows.append("  seen" if self.seen else "  NOT seen")
        return rows

    def draw(self, path: str | Path) -> Path:
        """Training loss and test accuracy over the epochs: the mean of the seeds, and their range."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), ("train_loss", "test_accuracy"), strict=True):
            for form, runs in self.runs.items():
                curves = torch.tensor([[row[key] for row in run.history] for run in runs])
                epochs = range(1, curves.shape[1] + 1)
                (line,) = axes.plot(epochs, curves.mean(0), label=form)
                low, high = curves.amin(0), curves.amax(0)
                axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2)
            axes.set(
                xlabel="epoch",
                ylabel=key.replace("_", " "),
                yscale="log" if key == "train_loss" else "linear",
            )
            axes.grid(alpha=0.3)
        axes.legend()
        figure.suptitle(self.claim.text, fontsize=10)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return Path(path)


def reproduce(
    claim: Claim,
    data: Data,
    seeds: int = 3,
    epochs: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Trains every form with every seed; form and seed alone decide the numbers."""
    data = smaller(data, claim.side)
    outcome = Outcome(claim)
    for form, model_args in claim.forms.items():
        arguments = {**claim.recipe.model_args, **model_args}
        recipe = claim.recipe.override(model=arguments.pop("model", None), epochs=epochs)
        recipe = dataclasses.replace(recipe, model_args=arguments)
        tried = []
        for rate in claim.learning_rates or (recipe.lr,):
            runs = []
            for seed in range(seeds):
                progress(
                    f"{form}, seed {seed}" + (f", learning rate {rate:g}" if claim.learning_rates else "")
                )
                trainer = Trainer(recipe.override(lr=rate), data, seed)
                count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
                runs.append(Run(count, _history(trainer), trainer))
            tried.append(runs)
        outcome.runs[form] = min(tried, key=claim.mean)
    return outcome


def _history(trainer: Trainer) -> list[dict]:
    """The epochs' rows; those after the loss became infinite or NaN have the accuracy of guessing."""
    try:
        trainer.fit(progress=Progress(silent=True))
    except NonFiniteError:
        guess = 1 / len(trainer.data.classes)
        lost = {"train_loss": math.inf, "train_accuracy": guess, "test_accuracy": guess}
        missing = range(len(trainer.history) + 1, trainer.recipe.epochs + 1)
        return trainer.history + [{"epoch": epoch, **lost} for epoch in missing]
    return trainer.history


def smaller(data: Data, side: int) -> Data:
    """The same data with pictures averaged down to side×side."""
    if side == data.shape[1]:
        return data
    if not isinstance(data.train, ImageSet):
        raise ValueError(f"reproduce: expected a data set that is held in memory, got {data.name}")
    train, test = (ImageSet(F.adaptive_avg_pool2d(s.images, side), s.labels) for s in (data.train, data.test))
    return dataclasses.replace(data, train=train, test=test, shape=(data.shape[0], side, side))


def f6_agreement(run: Run) -> float:
    """The part of F6's 84 units that have the sign of the right class's bitmap, over the test pictures."""
    model, test = run.trainer.model.eval(), run.trainer.data.test
    with torch.no_grad():
        drawn = model.forward_f6(test.images).flatten(1)
    return (drawn.sign() == model.rbf.bitmaps[test.labels].sign()).double().mean().item()


def _less(better: str, worse: str) -> Callable[[dict[str, list[float]]], bool]:
    """Less on average, by more than the standard error of the difference of the means."""

    def seen(values: dict[str, list[float]]) -> bool:
        first, second = values[better], values[worse]
        spread = sum(statistics.variance(v) / len(v) for v in (first, second) if len(v) > 1)
        return statistics.fmean(second) - statistics.fmean(first) > math.sqrt(spread)

    return seen


def _means(seen: Callable[[dict[str, float]], bool]) -> Callable[[dict[str, list[float]]], bool]:
    return lambda values: seen({form: statistics.fmean(each) for form, each in values.items()})


_SMALL = Recipe("alexnet_cifar", epochs=6, batch_size=32, lr=0.01, momentum=0.9, threads=1)
_RESIDUAL = Recipe(
    "resnet20", epochs=6, batch_size=32, lr=0.05, weight_decay=1e-4, schedule="cosine", threads=1
)

CLAIMS = {
    "relu": Claim(
        "With ReLU a training error is reached several times sooner than with tanh",
        "Krizhevsky et al. 2012, section 3.1",
        dataclasses.replace(_SMALL, model_args={"lrn": False}),
        {"tanh": {"activation": "tanh"}, "ReLU": {"activation": "relu"}},
        lambda run: run.epochs_to_error(0.05),
        "epochs until the training error is 5 %, or all of them",
        _means(lambda means: 2 * means["ReLU"] <= means["tanh"]),
        side=16,
        learning_rates=(0.003, 0.01, 0.03),
    ),
    "degradation": Claim(
        "A deeper plain network trains worse than a shallower one, a deeper residual one does not",
        "He et al. 2016, section 4.2",
        _RESIDUAL,
        {
            "plain, 20 layers": {"model": "plain20"},
            "plain, 44 layers": {"model": "plain44"},
            "residual, 20 layers": {"model": "resnet20"},
            "residual, 44 layers": {"model": "resnet44"},
        },
        Run.loss,
        "training loss at the end",
        _means(
            lambda means: (
                means["plain, 44 layers"] > means["plain, 20 layers"]
                and means["residual, 44 layers"] < means["plain, 44 layers"]
                and means["residual, 44 layers"] - means["residual, 20 layers"]
                < 0.5 * (means["plain, 44 layers"] - means["plain, 20 layers"])
            )
        ),
        side=8,
    ),
    "lrn": Claim(
        "Local response normalisation lowers the test error",
        "Krizhevsky et al. 2012, section 3.3",
        _SMALL,
        {"without LRN": {"lrn": False}, "with LRN": {"lrn": True}},
        Run.test_error,
        "test error",
        _less("with LRN", "without LRN"),
    ),
    "overlap": Claim(
        "Overlapped pooling (3/2 for 2/2) lowers the test error",
        "Krizhevsky et al. 2012, section 3.4",
        _SMALL,
        {"2×2/2": {"overlapped_pooling": False}, "3×3/2": {"overlapped_pooling": True}},
        Run.test_error,
        "test error",
        _less("3×3/2", "2×2/2"),
    ),
    "dropout": Claim(
        "Dropout lowers the test error of a network that fits its training set",
        "Krizhevsky et al. 2012, section 4.2",
        dataclasses.replace(_SMALL, epochs=12),
        {"no dropout": {"dropout": 0.0}, "dropout 0.5": {"dropout": 0.5}},
        Run.test_error,
        "test error",
        _less("dropout 0.5", "no dropout"),
    ),
    "densenet": Claim(
        "DenseNet needs fewer parameters than ResNet for the same error",
        "Huang et al. 2017, section 4.3",
        _RESIDUAL,
        {
            "ResNet": {"model": "resnet20"},
            "DenseNet-BC": {"model": "densenet_bc100_12", "depth": 22, "growth_rate": 12},
        },
        Run.test_error,
        "test error",
        _means(lambda means: means["DenseNet-BC"] <= means["ResNet"]),
        side=8,
    ),
    "batchnorm": Claim(
        "With batch normalisation a learning rate serves at which the network without it does not train",
        "Ioffe and Szegedy 2015, section 3.3",
        dataclasses.replace(_SMALL, model_args={"lrn": False}, lr=0.1, epochs=4),
        {"without": {"batch_norm": False}, "with batch-norm": {"batch_norm": True}},
        Run.test_error,
        "test error",
        _means(lambda means: means["with batch-norm"] < 0.5 * means["without"]),
    ),
    "drawing": Claim(
        "LeNet-5's F6 learns to draw the digit that it reads",
        "LeCun et al. 1998, section II.C",
        dataclasses.replace(load_recipe("lenet5"), epochs=8),
        {"lenet5": {}},
        f6_agreement,
        "part of F6's pixels that agree with the digit's bitmap",
        _means(lambda means: means["lenet5"] > 0.8),
    ),
}
