"""Pictures in folders, one folder a class: `imagefolder:FOLDER`.

FOLDER/train/CLASS/… and FOLDER/val/CLASS/… (or test/), or FOLDER/CLASS/…, of which a fifth of each class is
then held out. Every picture is scaled so that its shorter side is 256, its middle 256×256 taken (AlexNet,
section 2), and each channel normalised with ImageNet's mean and deviation, as torchvision's published weights
expect.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .data import Data, DataError, split_held_out

__all__ = ["DEVIATION", "MEAN", "Pictures", "imagefolder", "read_picture"]

SIDE = 256
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Pictures(Dataset):
    """Files and labels; an index gives (picture 3×256×256, label), read when it is asked for."""

    def __init__(self, files: list[Path], labels: Tensor, side: int = SIDE):
        self.files, self.labels, self.side = files, labels, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return read_picture(self.files[index], self.side), self.labels[index]


def imagefolder(folder: str, strict: bool = False) -> Data:
    """Unreadable pictures are skipped, with a count; `strict` makes the first of them an error.

    Raises DataError: no folder, no classes, a class without pictures, other classes in the test folder.
    """
    root = Path(folder)
    if not folder or not root.is_dir():
        raise DataError(f"imagefolder:FOLDER: {folder or '(nothing)'} is not a folder")
    test_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root:
        classes, files, labels = _scan(root / "train", strict)
        test_classes, test_files, test_labels = _scan(test_root, strict)
        if test_classes != classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise DataError(f"{folder}: train and {test_root.name} hold different classes ({odd})")
        train, test = Pictures(files, labels), Pictures(test_files, test_labels)
    else:
        classes, files, labels = _scan(root, strict)
        train, test = (Pictures([files[i] for i in part], labels[part]) for part in split_held_out(labels))
        if not len(test):
            raise DataError(f"{folder}: too few pictures to hold out a fifth of each class for the test")
    return Data(f"imagefolder:{folder}", train, test, classes, (3, SIDE, SIDE), (MEAN, DEVIATION))


def read_picture(
    path: Path, side: int = SIDE, mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> Tensor:
    """(3, side, side), normalised with each channel's mean and deviation.

    Raises DataError, naming the file, where it is not a readable picture.
    """
    return prepared(_decoded(path), side, mean, deviation)


def prepared(
    image, side: int, mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> Tensor:
    """A PIL picture in RGB, its shorter side scaled to `side`, the middle of it, normalised."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), resample=2)  # bilinear
    pixels = torch.from_numpy(numpy.array(image.crop((left, top, left + side, top + side))))
    mean, deviation = (torch.as_tensor(values).view(3, 1, 1) for values in (mean, deviation))
    return (pixels.permute(2, 0, 1).float().div(255) - mean) / deviation


def _decoded(path: Path):
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'cuda-cnn[train]'") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture, or corrupt ({error})") from error


def _scan(root: Path, strict: bool) -> tuple[list[str], list[Path], Tensor]:
    """Class names, files and labels. Every file is decoded once, so that corrupt ones are known before training."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{root}: holds no folders of pictures, one for each class")
    files, labels, defects = [], [], []
    with ThreadPoolExecutor() as pool:
        for label, name in enumerate(classes):
            found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            checked = list(zip(found, pool.map(_defect, found), strict=True))
            good = [path for path, defect in checked if defect is None]
            if not good:
                raise DataError(f"{root / name}: holds no readable picture")
            defects += [defect for _, defect in checked if defect]
            files += good
            labels += [label] * len(good)
    if defects and strict:
        raise DataError(defects[0])
    if defects:
        print(f"{root}: skipped {len(defects)} unreadable pictures, the first: {defects[0]}", file=sys.stderr)
    return classes, files, torch.tensor(labels)


def _defect(path: Path) -> str | None:
    try:
        _decoded(path)
    except DataError as error:
        return str(error)
    return None
