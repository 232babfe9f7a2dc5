"""torchvision's data sets and transforms, where torchvision is installed: `torchvision:NAME:FOLDER`, and
`{"name": "torchvision", "transform": "RandAugment", …}` among a recipe's augmentations."""

from __future__ import annotations

import importlib
import inspect

import numpy
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from ..models.registry import nearest
from .data import PICTURE_SIZE, Data, DataError, ink
from .imagefolder import DEVIATION, MEAN, SIDE, prepared

__all__ = ["Transform", "dataset"]


class Transform:
    """`torchvision.transforms.v2.<transform>(**arguments)`, picture by picture.

    It draws from torch's global random state, which is set from the generator and put back, so that the same
    generator gives the same pictures. Raises ValueError for a transform that torchvision lacks.
    """

    def __init__(self, transform: str, **arguments):
        known = {
            name: kind for name, kind in vars(_torchvision("transforms.v2")).items() if isinstance(kind, type)
        }
        if transform not in known:
            raise ValueError(f"torchvision: unknown transform {transform!r}{nearest(transform, known)}")
        self.transform = known[transform](**arguments)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([self.transform(image) for image in images])


class Prepared(Dataset):
    """A torchvision data set with grey pictures as ink on paper, coloured ones scaled, cropped and normalised."""

    def __init__(self, pictures: Dataset, side: int):
        self.pictures, self.side = pictures, side

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.pictures[index]
        if image.mode == "L":
            grey = torch.from_numpy(numpy.array(image)).float().div(255)
            return ink(grey[None, None])[0], torch.tensor(label)
        return prepared(image.convert("RGB"), self.side), torch.tensor(label)


def dataset(spec: str) -> Data:
    """NAME:FOLDER, a classification set of torchvision's that lies in FOLDER; nothing is downloaded.

    Coloured pictures keep their size up to 256, and are normalised with ImageNet's levels.
    """
    name, _, folder = spec.partition(":")
    known = _torchvision("datasets").__all__
    if name not in known:
        raise DataError(f"torchvision: unknown data set {name!r}{nearest(name, known)}")
    kind = getattr(_torchvision("datasets"), name)
    accepted = inspect.signature(kind).parameters
    if "train" in accepted:
        parts = ({"train": True}, {"train": False})
    elif "split" in accepted:
        parts = ({"split": "train"}, {"split": "test"})
    else:
        raise DataError(f"torchvision:{name} has no training and test part of its own")
    try:
        train, test = (kind(folder, **part) for part in parts)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"torchvision:{spec}: cannot be read ({error})") from error
    first = train[0][0]
    grey = first.mode == "L"
    side = PICTURE_SIZE if grey else min(SIDE, *first.size)
    classes = [str(c) for c in getattr(train, "classes", [])]
    if not classes:
        labels = getattr(train, "targets", getattr(train, "labels", None))
        classes = [str(i) for i in range(int(max(labels)) + 1)]
    return Data(
        f"torchvision:{spec}",
        Prepared(train, side),
        Prepared(test, side),
        classes,
        (1 if grey else 3, side, side),
        () if grey else (MEAN, DEVIATION),
    )


def _torchvision(module: str):
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError as error:
        raise ImportError(
            "this needs torchvision (pip install torchvision, for a torch of its version)"
        ) from error
