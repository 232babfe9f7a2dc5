"""What the networks of this package share: stages, classifier, the check of their input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """A trunk that comes in stages, and a classifier behind it.

    A network defines `stages` (a generator of the maps after each stage, finest first), `head` (the last map
    to logits), `classifier_layers` (the layers from the last map on, pooling apart), and the constants below.
    """

    input_size: int  # height and width in the paper
    min_size: int  # the smallest height and width that leave one pixel for the last map
    window = 1  # height and width of the last map that the classifier's first layer reads
    head_names: tuple[str, ...]  # the children that only the classifier needs

    def __init__(self, in_chans: int):
        super().__init__()
        self.in_chans = in_chans

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def classifier_layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raises ValueError for an input that this network cannot take."""
        _check_input(x, type(self).__name__, self.in_chans, self.min_size)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        for maps in self.stages(x):
            x = maps
        return self.head(x)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps after each stage, finest first."""
        self.check(x)
        return list(self.stages(x))

    def forward_dense(self, x: Tensor) -> Tensor:
        """Logits at every position of an image of any size, (N, num_classes, h, w): the fully-connected
        layers applied as convolutions (VGG, section 3.2; OverFeat). At the paper's input size h = w = 1 and
        the logits are forward's."""
        x = self.forward_features(x)[-1]
        if min(x.shape[-2:]) < self.window:
            raise ValueError(
                f"{type(self).__name__}: dense evaluation needs a last map of at least "
                f"{self.window}×{self.window}, got {x.shape[-2]}×{x.shape[-1]}; give a larger image"
            )
        window = self.window
        for layer in self.classifier_layers():
            if isinstance(layer, nn.Linear):
                x = F.conv2d(x, layer.weight.view(layer.out_features, -1, window, window), layer.bias)
                window = 1
            else:
                x = layer(x)
        return x


@torch.fx.wrap  # one node of a traced graph, not traced into
def _check_input(x: Tensor, network: str, in_chans: int, min_size: int) -> None:
    """Raises ValueError unless x is (N, in_chans, H, W) with H, W ≥ min_size."""
    shape = list(x.shape)
    if len(shape) != 4:
        raise ValueError(
            f"{network}: expected input of 4 dimensions (N, C, H, W), got {len(shape)} (shape {shape})"
        )
    if shape[1] != in_chans:
        raise ValueError(f"{network}: expected {in_chans} input channels, got {shape[1]} (shape {shape})")
    if min(shape[2:]) < min_size:
        raise ValueError(
            f"{network}: expected input of at least {min_size}×{min_size} pixels, got {shape[2]}×{shape[3]}"
        )
