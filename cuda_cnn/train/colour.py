"""AlexNet's colour noise (Krizhevsky et al., 2012, section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

__all__ = ["IMAGENET_EIGENVALUES", "IMAGENET_EIGENVECTORS", "ColourNoise"]

# ImageNet's, for pixels of 0 … 1, as published with cuda-convnet (there for 0 … 255) and fb.resnet.torch.
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = (  # in columns
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
SAMPLE = 1000


class ColourNoise:
    """Adds [p1 p2 p3][α1·λ1, α2·λ2, α3·λ3]ᵀ to every pixel of a picture, one draw of α ~ N(0, std²) a
    picture.

    p and λ are eigenvectors and eigenvalues of the covariance of the training set's RGB pixels, all pixels on
    a scale of 0 … 1; by default ImageNet's. `scale` is what the pictures were divided by since, a number or
    one a channel.

    Called with (images N×3×H×W, generator). Raises ValueError for another number of channels.
    """

    def __init__(
        self,
        std: float = 0.1,
        eigenvalues: tuple[float, ...] = IMAGENET_EIGENVALUES,
        eigenvectors: tuple[tuple[float, ...], ...] = IMAGENET_EIGENVECTORS,
        scale: float | tuple[float, ...] = 1.0,
    ):
        self.std = std
        self.axes = torch.as_tensor(eigenvectors) * torch.as_tensor(eigenvalues)
        self.scale = torch.as_tensor(scale)

    @classmethod
    def of(cls, images: Tensor, std: float = 0.1) -> ColourNoise:
        """With the eigenvectors of these pictures, N×3×H×W on a scale of 0 … 1."""
        _check(images)
        pixels = images.double().transpose(0, 1).flatten(1)
        eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(pixels, correction=0))
        return cls(std, eigenvalues.flip(0).float(), eigenvectors.flip(1).float())

    @classmethod
    def of_dataset(
        cls, train: Dataset, std: float = 0.1, scale: float | tuple[float, ...] = 1.0
    ) -> ColourNoise:
        """With the eigenvectors of a training set, of 1,000 of its pictures where it is larger: a recipe's
        `{"name": "colour_noise", "of": "train", "scale": …}`."""
        chosen = range(0, len(train), math.ceil(len(train) / SAMPLE))
        images = torch.stack([train[i][0] for i in chosen])
        _check(images)
        divisor = torch.as_tensor(scale)
        noise = cls.of(images * divisor.view(-1, 1, 1), std)
        noise.scale = divisor
        return noise

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        _check(images)
        alpha = torch.randn(len(images), 3, generator=generator) * self.std
        shift = (alpha @ self.axes.T) / self.scale
        return images + shift.to(images).view(-1, 3, 1, 1)


def _check(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"ColourNoise: expected pictures of shape (N, 3, H, W), got {list(images.shape)}")
