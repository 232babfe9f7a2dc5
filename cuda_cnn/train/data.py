"""Data sets: `load_data("digits")`, `load_data("mnist:FOLDER")`, and cifar10:, cifar100:, imagefolder:.

A source is a function `folder -> Data`, one row of SOURCES. Pictures are tensors of N×C×H×W, digits with the
paper's levels: background −0.1, full ink 1.175, so that the mean is about 0 and the variance about 1.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..models.registry import nearest

__all__ = ["SOURCES", "Data", "DataError", "ImageSet", "ink", "load_data", "read_idx", "split_held_out"]

BACKGROUND, INK = -0.1, 1.175
PICTURE_SIZE = 32
DIGIT_BOX = 28
HELD_OUT = 5
IDX_TYPES = {
    8: torch.uint8,
    9: torch.int8,
    11: torch.int16,
    12: torch.int32,
    13: torch.float32,
    14: torch.float64,
}


class DataError(ValueError):
    """A data set or a picture that is missing, unreadable or not what it should be."""


class ImageSet(Dataset):
    """Pictures held in memory; an index, or a list of them, gives (pictures, labels)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass
class Data:
    """A training and a test set, the names of the classes, and the shape of one picture (C, H, W).

    levels: the mean and the deviation of each channel that pixels of 0 … 1 were normalised with; empty for
    pictures of ink on paper.
    """

    name: str
    train: Dataset
    test: Dataset
    classes: list[str]
    shape: tuple[int, int, int]
    levels: tuple = ()


def load_data(spec: str, strict: bool = False) -> Data:
    """Reads the data set called `spec`: "digits", or KIND:FOLDER.

    strict: a picture file that cannot be read is an error; else such files are skipped, and counted on stderr.

    Raises DataError, which names the file and what is wrong with it.
    """
    kind, _, folder = spec.partition(":")
    if kind not in SOURCES:
        raise DataError(f"unknown data set {kind!r}{nearest(kind, SOURCES)}")
    return SOURCES[kind](folder, strict) if kind == "imagefolder" else SOURCES[kind](folder)


def ink(pictures: Tensor, box: int = DIGIT_BOX, size: int = PICTURE_SIZE) -> Tensor:
    """(N, 1, h, w) with 0 = paper and 1 = ink, scaled to box×box and centred in size×size, paper's levels."""
    if pictures.shape[-2:] != (box, box):
        pictures = F.interpolate(pictures, size=(box, box), mode="bilinear", align_corners=False)
    before = (size - box) // 2
    after = size - box - before
    return F.pad(pictures, (before, after, before, after)) * (INK - BACKGROUND) + BACKGROUND


def split_held_out(
    labels: Tensor, parts: int = HELD_OUT, part: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices of (the rest, one of `parts` equal parts): a fixed choice, the same fraction of each class."""
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        is_held = torch.arange(len(of_class)) % parts == part
        kept.append(of_class[~is_held])
        held.append(of_class[is_held])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def digits(folder: str = "") -> Data:
    """scikit-learn's 1,797 handwritten digits (8×8), a fixed stratified fifth held out for the test."""
    if folder:
        raise DataError(f"digits are bundled with scikit-learn and take no folder, got {folder!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the bundled digits need scikit-learn: pip install 'cuda-cnn[train]'") from error
    bundled = load_digits()
    images = ink(torch.from_numpy(bundled.images).float().div(16).unsqueeze(1))
    labels = torch.from_numpy(bundled.target).long()
    train, test = (ImageSet(images[i], labels[i]) for i in split_held_out(labels))
    return Data("digits", train, test, list("0123456789"), (1, PICTURE_SIZE, PICTURE_SIZE))


def mnist(folder: str) -> Data:
    """MNIST's four IDX files (`train-images-idx3-ubyte` …, plain or .gz) in `folder`; 28×28 in 32×32."""
    if not Path(folder).is_dir() or not folder:
        raise DataError(f"mnist:FOLDER: {folder or '(nothing)'} is not a folder")
    sets = []
    for stem in ("train", "t10k"):
        images_file = _find_idx(Path(folder), f"{stem}-images", "idx3-ubyte")
        labels_file = _find_idx(Path(folder), f"{stem}-labels", "idx1-ubyte")
        images, labels = read_idx(images_file), read_idx(labels_file)
        if images.dim() != 3 or images.dtype != torch.uint8:
            raise DataError(
                f"{images_file}: expected pictures N×H×W of bytes, got shape {list(images.shape)}"
            )
        if labels.dim() != 1 or len(labels) != len(images):
            raise DataError(f"{labels_file}: {list(labels.shape)} labels do not fit {len(images)} pictures")
        if not len(labels):
            raise DataError(f"{images_file}: holds no picture")
        if labels.max() > 9:
            raise DataError(f"{labels_file}: expected labels 0 to 9, got {labels.max().item()}")
        sets.append(ImageSet(ink(images.float().div(255).unsqueeze(1)), labels.long()))
    return Data(f"mnist:{folder}", *sets, list("0123456789"), (1, PICTURE_SIZE, PICTURE_SIZE))


def read_idx(path: str | Path) -> Tensor:
    """The tensor in an IDX file, plain or gzipped. Raises DataError, naming the file and what is wrong."""
    data = _read_bytes(Path(path))
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES:
        raise DataError(f"{path}: not an IDX file (first bytes {data[:4].hex(' ') or 'missing'})")
    dtype, header = IDX_TYPES[data[2]], 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, min(header, len(data)), 4)]
    expected = header + math.prod(shape) * dtype.itemsize
    if len(data) < expected:
        raise DataError(f"{path}: truncated: shape {shape} needs {expected} bytes, the file has {len(data)}")
    if len(data) > expected:
        raise DataError(f"{path}: {len(data) - expected} bytes more than shape {shape} needs")
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    body = torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8)
    big_endian = body.reshape(-1, dtype.itemsize)
    return big_endian.flip(1).contiguous().view(dtype).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or corrupt gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _find_idx(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{joint}{kind}{packed}" for joint in "-." for packed in ("", ".gz")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder}: no {names[0]} or {names[1]} in it")


def _from(module: str, name: str) -> Callable[..., Data]:
    """A source whose module is imported on its first use."""
    return lambda *arguments: getattr(importlib.import_module(module, __package__), name)(*arguments)


SOURCES: dict[str, Callable[..., Data]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": _from(".cifar", "cifar10"),
    "cifar100": _from(".cifar", "cifar100"),
    "imagefolder": _from(".imagefolder", "imagefolder"),
    "torchvision": _from(".vision", "dataset"),
}
