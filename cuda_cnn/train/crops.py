"""Crops, flips and scales: in training (AlexNet, VGG, the CIFAR networks), and the ways to test with several
of them.

In training each is an instance that maps (images N×C×H×W, generator) to images; the same generator state
gives the same pictures. In a test each function gives probabilities (N, num_classes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

__all__ = [
    "Crop",
    "Flip",
    "ScaleJitter",
    "centre_test",
    "dense_test",
    "multi_scale_test",
    "resize_shorter_side",
    "ten_crop_test",
    "ten_crops",
    "whole_test",
]


class Flip:
    """Mirrors each picture left to right with probability p."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        mirrored = (torch.rand(len(images), generator=generator) < self.p).to(images.device)
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


class Crop:
    """A random size×size part of each picture, after a border of `pad` pixels of value `fill` (CIFAR: size
    32, pad 4)."""

    def __init__(self, size: int, pad: int = 0, fill: float = 0.0):
        self.size, self.pad, self.fill = size, pad, fill

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        images = F.pad(images, (self.pad,) * 4, value=self.fill) if self.pad else images
        corners = _corners(images, self.size, generator)
        parts = [_part(image, *corner, self.size) for image, corner in zip(images, corners, strict=True)]
        return torch.stack(parts)


class ScaleJitter:
    """VGG's multi-scale training (section 3.1): each picture is scaled so that its shorter side is S, drawn
    evenly from smallest … largest, and a random size×size part of it is taken."""

    def __init__(self, size: int = 224, smallest: int = 256, largest: int = 512):
        if not size <= smallest <= largest:
            raise ValueError(
                f"ScaleJitter: expected size ≤ smallest ≤ largest, got {size}, {smallest}, {largest}"
            )
        self.size, self.smallest, self.largest = size, smallest, largest

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        sides = torch.randint(self.smallest, self.largest + 1, (len(images),), generator=generator).tolist()
        parts = []
        for image, side in zip(images.split(1), sides, strict=True):
            scaled = resize_shorter_side(image, side)
            (corner,) = _corners(scaled, self.size, generator)
            parts.append(_part(scaled[0], *corner, self.size))
        return torch.stack(parts)


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Scaled isotropically, bilinear with antialiasing, so that the shorter side is `side` pixels."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    size = [round(height * side / shorter), round(width * side / shorter)]
    return images if size == [height, width] else F.interpolate(images, size, mode="bilinear", antialias=True)


@torch.no_grad()
def whole_test(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).softmax(1)


@torch.no_grad()
def centre_test(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """The softmax of the middle of each picture."""
    height, width = _room(images, size)
    return model(_part(images, height // 2, width // 2, size)).softmax(1)


def ten_crops(images: Tensor, size: int) -> Tensor:
    """The four corners and the centre, then their mirror images: (10, N, C, size, size) (AlexNet, section
    4.1)."""
    height, width = _room(images, size)
    corners = [(0, 0), (0, width), (height, 0), (height, width), (height // 2, width // 2)]
    five = torch.stack([_part(images, *corner, size) for corner in corners])
    return torch.cat([five, five.flip(-1)])


@torch.no_grad()
def ten_crop_test(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Mean of the softmax over the ten crops (AlexNet, section 4.1)."""
    return torch.stack([model(crop).softmax(1) for crop in ten_crops(images, size)]).mean(0)


@torch.no_grad()
def dense_test(model: nn.Module, images: Tensor) -> Tensor:
    """The fully-connected layers applied as convolutions over the whole picture, the map of scores averaged
    over its positions; the softmax averaged over the picture and its mirror image (VGG, section 3.2)."""
    if not hasattr(model, "forward_dense"):
        raise ValueError(
            f"dense evaluation: {type(model).__name__} has no convolutional form of its classifier"
        )
    views = (images, images.flip(3))
    return torch.stack([model.forward_dense(view).mean((2, 3)).softmax(1) for view in views]).mean(0)


def multi_scale_test(
    test: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, images: Tensor, sides: Iterable[int]
) -> Tensor:
    """Mean of `test(model, images)` over pictures whose shorter side is each of `sides` (VGG, section
    4.2)."""
    return torch.stack([test(model, resize_shorter_side(images, side)) for side in sides]).mean(0)


def _room(images: Tensor, size: int) -> tuple[int, int]:
    """The largest top and left of a crop."""
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"crop: expected pictures of at least {size}×{size} pixels, got {height}×{width}")
    return height - size, width - size


def _corners(images: Tensor, size: int, generator: Generator) -> list[list[int]]:
    height, width = _room(images, size)
    top = torch.randint(height + 1, (len(images),), generator=generator)
    left = torch.randint(width + 1, (len(images),), generator=generator)
    return torch.stack([top, left], 1).tolist()


def _part(image: Tensor, top: int, left: int, size: int) -> Tensor:
    return image[..., top : top + size, left : left + size]
