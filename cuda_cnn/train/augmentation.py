"""Random changes of the training pictures, a batch at a time: `build([{"name": "affine", "shift": 2}])`.

An augmentation is a class whose arguments are numbers and whose instances map (images, generator) to images;
the same generator state gives the same pictures.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..models.registry import nearest
from .colour import ColourNoise
from .crops import Crop, Flip, ScaleJitter
from .vision import Transform

__all__ = ["AUGMENTATIONS", "Affine", "build"]


class Affine:
    """Shifts by up to `shift` pixels, turns by up to `rotate` degrees, scales each axis by up to ±`scale`."""

    def __init__(self, shift: float = 0.0, rotate: float = 0.0, scale: float = 0.0):
        self.shift, self.rotate, self.scale = shift, rotate, scale

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        n, _, height, width = images.shape
        turn, grow_x, grow_y, move_x, move_y = torch.rand(5, n, generator=generator) * 2 - 1
        angle = turn * math.radians(self.rotate)
        scale_x, scale_y = 1 + grow_x * self.scale, 1 + grow_y * self.scale
        row_x = torch.stack(
            (angle.cos() * scale_x, -angle.sin() * scale_x, move_x * self.shift * 2 / width), 1
        )
        row_y = torch.stack(
            (angle.sin() * scale_y, angle.cos() * scale_y, move_y * self.shift * 2 / height), 1
        )
        grid = F.affine_grid(
            torch.stack((row_x, row_y), 1).to(images), list(images.shape), align_corners=False
        )
        # What comes in from outside is paper: the level of each picture's first pixel.
        paper = images[:, :, :1, :1]
        return F.grid_sample(images - paper, grid, align_corners=False) + paper


AUGMENTATIONS = {
    "affine": Affine,
    "colour_noise": ColourNoise,
    "crop": Crop,
    "flip": Flip,
    "scale_jitter": ScaleJitter,
    "torchvision": Transform,
}


def build(descriptions: list[dict], train: Dataset | None = None) -> list:
    """Instances for a recipe's list of {"name": …, argument: …}; `train` for those that look at the training set.

    Raises ValueError for unknown names and arguments.
    """
    steps = []
    for description in descriptions:
        arguments = dict(description)
        name = arguments.pop("name", None)
        if name not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {name!r}{nearest(str(name), AUGMENTATIONS)}")
        make = AUGMENTATIONS[name]
        if arguments.pop("of", None) == "train":  # computed from the training set
            make = partial(make.of_dataset, train)
        try:
            steps.append(make(**arguments))
        except TypeError as error:
            raise ValueError(f"augmentation {name!r}: {error}") from error
    return steps
