"""Recipes: how a network is trained, as small JSON files beside this one, each naming its paper.

`load_recipe("lenet5")` reads lenet5.json; an option of `cuda-cnn train` overrides one field.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ...models.registry import nearest

__all__ = ["Recipe", "list_recipes", "load_recipe"]

FOLDER = Path(__file__).parent
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run but its data, its seed and its folder.

    warm_up: the part of the run, 0 … 1, in which the learning rate rises to `lr`.
    test_crop: the test takes the middle of each picture, of this height and width; 0 takes all of it.
    precision: "float32", or "bfloat16" or "float16" for the layers that torch.autocast names (weights, their
    updates and the loss stay float32; float16 with a loss scaler).
    accumulate: cuts each batch into so many parts, one after the other; the gradient is that of the whole batch
    (batch statistics are those of a part).
    average: the part that the running average of the weights (EMA) keeps at each step, such as 0.999; the
    averaged weights are those that are tested and used. 0: none.
    channels_last: pictures and weights as NHWC. compile: a backend of torch.compile, such as "inductor"; "": none.
    sync_batch_norm: under torchrun, statistics over all workers' parts of a batch.
    threads: on a CPU; 0 keeps torch's. Small pictures are as quick with 1, which waits for no neighbour.
    loaders: processes that read pictures from files beside the one that trains.
    """

    model: str
    model_args: dict = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    schedule_args: dict = field(default_factory=dict)
    warm_up: float = 0.0
    loss: str = "cross_entropy"
    loss_args: dict = field(default_factory=dict)
    augment: list = field(default_factory=list)
    test_crop: int = 0
    precision: str = "float32"
    accumulate: int = 1
    average: float = 0.0
    channels_last: bool = False
    compile: str = ""
    sync_batch_norm: bool = False
    threads: int = 0
    loaders: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        for name, least in {
            "epochs": 1,
            "batch_size": 1,
            "accumulate": 1,
            "threads": 0,
            "loaders": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"recipe: expected {name} of at least {least}, got {getattr(self, name)}")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"recipe: expected warm_up of 0 to 1, got {self.warm_up}")
        if not 0 <= self.average < 1:
            raise ValueError(f"recipe: expected average of 0 to below 1, got {self.average}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"recipe: unknown precision {self.precision!r}{nearest(self.precision, PRECISIONS)}"
            )
        if not self.lr > 0:
            raise ValueError(f"recipe: expected lr above 0, got {self.lr}")

    def override(self, **fields) -> Recipe:
        """The same recipe with those of `fields` that are not None; another loss or schedule comes
        without the old one's arguments."""
        changed = {k: v for k, v in fields.items() if v is not None}
        for key in ("loss", "schedule"):
            if changed.get(key, getattr(self, key)) != getattr(self, key):
                changed.setdefault(f"{key}_args", {})
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"recipe: unknown field {key!r}{nearest(key, known)}")
        return cls(**values)


def list_recipes() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a JSON file of one's own. Raises ValueError naming what is wrong."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown recipe {name!r}{nearest(name, list_recipes())}")
    try:
        return Recipe.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path}: not a recipe ({error})") from error
