"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from the files of their home page: the "binary" or the "python"
version.

Pictures come as 3×32×32, each channel with the training set's mean 0 and deviation 1.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Data, DataError, ImageSet

__all__ = ["cifar10", "cifar100"]

PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """File names of one data set; the binary version adds .bin to those of the pictures."""

    classes: int
    train: list[str]
    test: str
    archive: str  # folder that unpacking makes, up to its last word
    names: str  # class names in the binary version
    meta: str  # … and in the python version, under names_key
    label_key: bytes
    names_key: bytes


TEN = Layout(
    classes=10,
    train=[f"data_batch_{i}" for i in range(1, 6)],
    test="test_batch",
    archive="cifar-10-batches",
    names="batches.meta.txt",
    meta="batches.meta",
    label_key=b"labels",
    names_key=b"label_names",
)
HUNDRED = Layout(
    classes=100,
    train=["train"],
    test="test",
    archive="cifar-100",
    names="fine_label_names.txt",
    meta="meta",
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
)


def cifar10(folder: str) -> Data:
    """`data_batch_1.bin` … `test_batch.bin`, or `data_batch_1` … `test_batch`, in `folder` or its archive's
    folder."""
    return _load("cifar10", folder, TEN)


def cifar100(folder: str) -> Data:
    """`train.bin` and `test.bin`, or `train` and `test`; the hundred fine labels."""
    return _load("cifar100", folder, HUNDRED)


def _load(kind: str, folder: str, layout: Layout) -> Data:
    if not folder or not Path(folder).is_dir():
        raise DataError(f"{kind}:FOLDER: {folder or '(nothing)'} is not a folder")
    read, names = _reader(Path(folder), layout)
    sets = []
    for files in (layout.train, [layout.test]):
        images, labels = (torch.cat(parts) for parts in zip(*map(read, files), strict=True))
        if not len(labels) or labels.max() >= layout.classes:
            raise DataError(f"{folder}: expected labels 0 to {layout.classes - 1} and at least one picture")
        sets.append((images.float().div(255), labels))
    pixels = sets[0][0]
    mean = pixels.mean((0, 2, 3), keepdim=True)
    deviation = pixels.std((0, 2, 3), keepdim=True, correction=0).clamp(min=1e-6)
    train, test = (ImageSet((images - mean) / deviation, labels) for images, labels in sets)
    if len(names) != layout.classes:
        names = [str(i) for i in range(layout.classes)]
    levels = tuple(tuple(level.flatten().tolist()) for level in (mean, deviation))
    return Data(f"{kind}:{folder}", train, test, names, (3, 32, 32), levels)


def _reader(folder: Path, layout: Layout) -> tuple[Callable[[str], tuple[Tensor, Tensor]], list[str]]:
    """What reads one file of pictures by its name, and the names of the classes."""
    for place in (
        folder,
        *(folder / f"{layout.archive}-{form}" for form in ("bin", "binary", "py", "python")),
    ):
        if (place / f"{layout.test}.bin").is_file():
            names = place / layout.names
            read = partial(_read_binary, place, 1 if layout.classes == 10 else 2)
            return read, names.read_text().split() if names.is_file() else []
        if (place / layout.test).is_file():
            meta = _unpickle(place / layout.meta) if (place / layout.meta).is_file() else {}
            read = partial(_read_pickled, place, layout.label_key)
            return read, [name.decode() for name in meta.get(layout.names_key, [])]
    raise DataError(f"{folder}: no {layout.test}.bin and no {layout.test} in it")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_binary(place: Path, label_bytes: int, name: str) -> tuple[Tensor, Tensor]:
    """Records of one label byte (CIFAR-100: coarse, then fine) and 3072 pixel bytes."""
    path = place / f"{name}.bin"
    data = _read_bytes(path)
    record = label_bytes + PIXELS
    if not data or len(data) % record:
        raise DataError(f"{path}: truncated: {len(data)} bytes are not a multiple of {record}")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, record)
    return rows[:, -PIXELS:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long()


def _read_pickled(place: Path, label_key: bytes, name: str) -> tuple[Tensor, Tensor]:
    path = place / name
    batch = _unpickle(path)
    try:
        images, labels = torch.from_numpy(batch[b"data"]), torch.tensor(batch[label_key])
        return images.reshape(len(labels), 3, 32, 32), labels
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: not a batch of CIFAR pictures ({error})") from error


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain values; anything that could run code is refused."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "encode")

    def find_class(self, module: str, name: str):
        if name in self.ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(path: Path) -> dict:
    try:
        value = _ArraysOnly(io.BytesIO(_read_bytes(path)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: truncated, corrupt or not a CIFAR file ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a CIFAR file")
    return value
