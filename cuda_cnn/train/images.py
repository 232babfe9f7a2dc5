"""Picture files for `predict`: read, and brought to the form that the digits were trained in."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import BACKGROUND, DIGIT_BOX, INK, PICTURE_SIZE, DataError

__all__ = ["read_ink"]

LEAST_CONTRAST = 0.05
INK_LEVEL = 0.25


def read_ink(path: str | Path, box: int = DIGIT_BOX, size: int = PICTURE_SIZE) -> Tensor:
    """One character in a picture file, (1, 1, size, size): cropped to its ink, scaled so that its longer side
    is `box`, centred, at the paper's levels. Dark ink on light paper and the reverse both work.

    Raises DataError, naming the file: missing, not a picture, truncated, or blank.
    """
    grey = _read_grey(Path(path))
    border = torch.cat((grey[0], grey[-1], grey[:, 0], grey[:, -1])).median()
    contrast = grey - border
    contrast = contrast if contrast.max() > -contrast.min() else -contrast
    if contrast.max() < LEAST_CONTRAST:
        raise DataError(f"{path}: the picture is blank")
    level = (contrast / contrast.max()).clamp(min=0)
    inked = level > INK_LEVEL
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    character = level[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = character.shape
    scaled = [max(1, round(side * box / max(height, width))) for side in (height, width)]
    character = F.interpolate(character[None, None], size=scaled, mode="bilinear", antialias=True)
    top, left = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    padding = (left, size - scaled[1] - left, top, size - scaled[0] - top)
    return F.pad(character, padding) * (INK - BACKGROUND) + BACKGROUND


def _read_grey(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'cuda-cnn[train]'") from error
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image)
            deep = image.mode.startswith(("I", "F"))
            image = image if deep else image.convert("L")
            grey = torch.from_numpy(numpy.array(image, dtype=numpy.float32))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture, or corrupt ({error})") from error
    return grey / grey.max().clamp(min=1) if deep else grey / 255
