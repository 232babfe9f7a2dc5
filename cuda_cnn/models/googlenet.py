"""GoogLeNet (Szegedy et al., "Going deeper with convolutions", CVPR 2015): the paper's network, and
torchvision's variant with batch normalisation and 3×3 convolutions in the place of the 5×5 ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, CrossEntropyLoss, Dropout, Identity, Linear, Module, Sequential, init

from cuda_cnn import nn

from .base import ConvNet
from .registry import register_model

__all__ = ["AUXILIARY_WEIGHT", "AuxiliaryCrossEntropy", "GoogLeNet", "GoogLeNetOutputs"]

AUXILIARY_WEIGHT = 0.3  # section 5

# Table 1: #1×1, #3×3 reduce, #3×3, #5×5 reduce, #5×5, pool proj
_INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}

_TRUNK = [
    "conv1",
    "maxpool1",
    "lrn1",
    "conv2",
    "conv3",
    "lrn2",
    "maxpool2",
    "inception3a",
    "inception3b",
    "maxpool3",
]
_TRUNK += [f"inception4{letter}" for letter in "abcde"] + ["maxpool4", "inception5a", "inception5b"]
# From ImageNet's mean and deviation of each channel to mean 0.5, deviation 0.5.
_SCALE = [0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5]
_SHIFT = [(0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5]
_STAGE_ENDS = ("conv1", "lrn2", "inception3b", "inception4e", "inception5b")


class GoogLeNetOutputs(NamedTuple):
    """What the network returns in training; in evaluation it returns the logits alone."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class AuxiliaryCrossEntropy(CrossEntropyLoss):
    """Cross-entropy of the logits plus 0.3 times that of each auxiliary classifier (section 5); of logits alone
    `torch.nn.CrossEntropyLoss`, whose arguments it takes."""

    def forward(self, outputs: GoogLeNetOutputs | Tensor, target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return super().forward(outputs, target)
        main, *auxiliary = (super(AuxiliaryCrossEntropy, self).forward(logits, target) for logits in outputs)
        return main + AUXILIARY_WEIGHT * sum(auxiliary)


class BasicConv2d(Module):
    """Convolution, batch normalisation where asked for (then without bias), ReLU."""

    def __init__(self, in_chans: int, planes: int, kernel: int, batch_norm: bool, stride: int = 1):
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(in_chans, planes, kernel, stride=stride, padding=padding, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(planes, eps=0.001) if batch_norm else Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(Module):
    """1×1, 3×3, 5×5 and pooled branches, concatenated (Figure 2b)."""

    def __init__(self, in_chans: int, widths: tuple[int, ...], batch_norm: bool, large_kernel: int):
        super().__init__()
        one, reduce3, three, reduce5, five, projection = widths
        self.branch1 = BasicConv2d(in_chans, one, 1, batch_norm)
        self.branch2 = Sequential(
            BasicConv2d(in_chans, reduce3, 1, batch_norm), BasicConv2d(reduce3, three, 3, batch_norm)
        )
        self.branch3 = Sequential(
            BasicConv2d(in_chans, reduce5, 1, batch_norm),
            BasicConv2d(reduce5, five, large_kernel, batch_norm),
        )
        self.branch4 = Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(in_chans, projection, 1, batch_norm),
        )
        self.concat = nn.Concat(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.concat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)])


class AuxiliaryClassifier(Module):
    """Average pool to 4×4, 1×1 convolution of 128 maps, 1024 units, dropout 0.7, logits (section 5).

    The paper's pool is 5×5/3 on a 14×14 map; torchvision pools adaptively, which differs (`adaptive`), and
    which also serves maps of any other size.
    """

    def __init__(self, in_chans: int, num_classes: int, batch_norm: bool, adaptive: bool, dropout: float):
        super().__init__()
        self.adaptive = adaptive
        self.conv = BasicConv2d(in_chans, 128, 1, batch_norm)
        self.fc1 = Linear(128 * 4 * 4, 1024)
        self.fc2 = Linear(1024, num_classes)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.adaptive or x.shape[-2:] != (14, 14):
            x = F.adaptive_avg_pool2d(x, 4)
        else:
            x = F.avg_pool2d(x, 5, stride=3)
        x = F.relu(self.fc1(self.conv(x).flatten(1)), inplace=True)
        return self.fc2(self.dropout(x))


class GoogLeNet(ConvNet):
    """Table 1 of the paper. In training it returns GoogLeNetOutputs (see AuxiliaryCrossEntropy), else the logits.

    variant: "paper" (local response normalisation, 5×5 convolutions, biases, dropout 0.4) or "torchvision"
        (batch normalisation, no LRN, 3×3 for 5×5, adaptive pools in the auxiliaries, dropout 0.2).
    aux_logits: with the two auxiliary classifiers on 4a and 4d.
    transform_input: the input is normalised with ImageNet's statistics and is to be taken to the range that
        torchvision's published weights were trained with.
    """

    input_size = 224
    head_names = ("aux1", "aux2", "avgpool", "dropout", "fc")

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        variant: str = "paper",
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float | None = None,
        dropout_aux: float = 0.7,
    ):
        super().__init__(in_chans)
        if variant not in ("paper", "torchvision"):
            raise ValueError(f"GoogLeNet: expected variant 'paper' or 'torchvision', got {variant!r}")
        if transform_input and in_chans != 3:
            raise ValueError(f"GoogLeNet: transform_input is for 3 input channels, got {in_chans}")
        paper = variant == "paper"
        self.min_size = 31 if paper else 15
        batch_norm = not paper
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        self.conv1 = BasicConv2d(in_chans, 64, 7, batch_norm, stride=2)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        # α is divided by n here; the values are those of the reference model in Caffe, the paper gives none.
        self.lrn1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if paper else Identity()
        self.conv2 = BasicConv2d(64, 64, 1, batch_norm)
        self.conv3 = BasicConv2d(64, 192, 3, batch_norm)
        self.lrn2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if paper else Identity()
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(3 if paper else 2, stride=2, ceil_mode=True)
        planes = 192
        for name, widths in _INCEPTION.items():
            setattr(self, f"inception{name}", Inception(planes, widths, batch_norm, 5 if paper else 3))
            planes = widths[0] + widths[2] + widths[4] + widths[5]
        self.aux1 = (
            AuxiliaryClassifier(512, num_classes, batch_norm, not paper, dropout_aux) if aux_logits else None
        )
        self.aux2 = (
            AuxiliaryClassifier(528, num_classes, batch_norm, not paper, dropout_aux) if aux_logits else None
        )
        self.avgpool = AdaptiveAvgPool2d(1)
        self.dropout = Dropout(dropout if dropout is not None else 0.4 if paper else 0.2)
        self.fc = Linear(planes, num_classes)
        self.reset_parameters(paper)

    def reset_parameters(self, paper: bool) -> None:
        """The paper names no initialisation: its form starts as the reference model in Caffe (Xavier uniform,
        biases 0.2 in convolutions), the batch-norm form as torchvision (normal, σ 0.01, truncated)."""
        for layer in self.modules():
            if not isinstance(layer, (torch.nn.Conv2d, Linear)):
                continue
            if not paper:
                init.trunc_normal_(layer.weight, std=0.01, a=-2, b=2)
                continue
            init.xavier_uniform_(layer.weight)
            init.constant_(layer.bias, 0.2 if isinstance(layer, torch.nn.Conv2d) else 0.0)

    def forward(self, x: Tensor) -> GoogLeNetOutputs | Tensor:
        self.check(x)
        with_auxiliaries = self.training and self.aux_logits
        aux1 = aux2 = None
        for name, maps in self._trunk(x):
            if with_auxiliaries and name == "inception4a":
                aux1 = self.aux1(maps)
            elif with_auxiliaries and name == "inception4d":
                aux2 = self.aux2(maps)
        logits = self.head(maps)
        return GoogLeNetOutputs(logits, aux2, aux1) if with_auxiliaries else logits

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for name, maps in self._trunk(x):
            if name in _STAGE_ENDS:
                yield maps

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))

    def classifier_layers(self) -> list[Module]:
        return [self.dropout, self.fc]

    def _trunk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.transform_input:
            x = x * x.new_tensor(_SCALE).view(3, 1, 1) + x.new_tensor(_SHIFT).view(3, 1, 1)
        for name in _TRUNK:
            x = getattr(self, name)(x)
            yield name, x


@register_model
def googlenet(num_classes: int = 1000, in_chans: int = 3, **kwargs) -> GoogLeNet:
    """The paper's network; options: see GoogLeNet."""
    return GoogLeNet(num_classes, in_chans, variant="paper", **kwargs)


@register_model
def googlenet_torchvision(num_classes: int = 1000, in_chans: int = 3, **kwargs) -> GoogLeNet:
    """torchvision's form, for its weights; options: see GoogLeNet."""
    return GoogLeNet(num_classes, in_chans, variant="torchvision", **kwargs)
