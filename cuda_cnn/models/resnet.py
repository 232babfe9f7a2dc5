"""ResNet (He et al., "Deep residual learning for image recognition", CVPR 2016): the ImageNet networks, the
CIFAR networks of section 4.2, and the plain networks (no shortcuts) that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, Linear, Module, ReLU, Sequential, init

from cuda_cnn import nn

from .base import ConvNet
from .registry import register_model

__all__ = ["CifarResNet", "ResNet"]


def _conv(in_planes: int, planes: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(Module):
    """relu(F(x) + shortcut(x)), F two 3×3 convolutions (Figure 5, left)."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str, stride_on: str):
        super().__init__()
        self.conv1 = _conv(in_planes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(in_planes, planes, stride, shortcut)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(Module):
    """relu(F(x) + shortcut(x)), F = 1×1, 3×3, 1×1 convolutions (Figure 5, right)."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str, stride_on: str):
        super().__init__()
        out_planes = planes * self.expansion
        self.conv1 = _conv(in_planes, planes, 1, stride if stride_on == "1x1" else 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride if stride_on == "3x3" else 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, out_planes, 1)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.relu = ReLU(inplace=True)
        self.downsample = _shortcut(in_planes, out_planes, stride, shortcut)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ZeroPadShortcut(Module):
    """Option A: the map sub-sampled by `stride`, with maps of zeros behind it. No parameters."""

    def __init__(self, extra_planes: int, stride: int):
        super().__init__()
        self.extra_planes = extra_planes
        self.kernel_size, self.stride = 1, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_planes))


def _shortcut(in_planes: int, planes: int, stride: int, option: str) -> Module | None:
    """Section 3.3 and 4.1. A: zero-padded where the dimensions grow; B: projection there; C: projection
    everywhere. None is the identity."""
    grows = stride != 1 or in_planes != planes
    if option == "none" or (option in ("A", "B") and not grows):
        return None
    if option == "A":
        return ZeroPadShortcut(planes - in_planes, stride)
    return Sequential(_conv(in_planes, planes, 1, stride), nn.BatchNorm2d(planes))


class _ResidualNet(ConvNet):
    """What the ImageNet and the CIFAR form share. `depths` are the numbers of blocks of each stage."""

    head_names = ("avgpool", "fc")
    min_size = 1

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: list[int],
        width: int,
        num_classes: int,
        in_chans: int,
        stem: Module,
        *,
        stride_on: str = "3x3",
        shortcut: str = "B",
        zero_init_residual: bool = False,
    ):
        super().__init__(in_chans)
        if stride_on not in ("3x3", "1x1"):
            raise ValueError(f"{type(self).__name__}: expected stride_on '3x3' or '1x1', got {stride_on!r}")
        if shortcut not in ("A", "B", "C", "none"):
            raise ValueError(
                f"{type(self).__name__}: expected shortcut 'A', 'B', 'C' or 'none', got {shortcut!r}"
            )
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = ReLU(inplace=True)
        self.layer_names = [f"layer{i + 1}" for i in range(len(depths))]
        planes = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(planes, width << i, stride, shortcut, stride_on))
                planes = (width << i) * block.expansion
            setattr(self, self.layer_names[i], Sequential(*blocks))
        self.avgpool = AdaptiveAvgPool2d(1)
        self.fc = Linear(planes, num_classes)
        self.reset_parameters(zero_init_residual)

    def reset_parameters(self, zero_init_residual: bool) -> None:
        """He normal, fan-out. zero_init_residual: every block starts as the identity (Goyal et al., 2017)."""
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(layer, BasicBlock):
                init.zeros_(layer.bn2.weight)
            elif zero_init_residual and isinstance(layer, Bottleneck):
                init.zeros_(layer.bn3.weight)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        yield x
        x = self.pool(x)
        for name in self.layer_names:
            x = getattr(self, name)(x)
            yield x

    def pool(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(x).flatten(1))

    def classifier_layers(self) -> list[Module]:
        return [self.fc]


class ResNet(_ResidualNet):
    """Table 1 of the paper; torchvision's parameter names.

    stride_on: "3x3" puts a bottleneck's stride on its 3×3 convolution, as torchvision; "1x1" on the first
    1×1, as the
        paper. (Blocks of two 3×3 carry it on the first in both.)
    shortcut: "A", "B" (the paper's choice for these networks), "C", or "none" for a plain network.
    """

    input_size = 224

    def __init__(self, block, depths: list[int], num_classes: int = 1000, in_chans: int = 3, **kwargs):
        stem = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        super().__init__(block, depths, 64, num_classes, in_chans, stem, **kwargs)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

    def pool(self, x: Tensor) -> Tensor:
        return self.maxpool(x)


class CifarResNet(_ResidualNet):
    """Section 4.2: 6n + 2 layers, three stages of n blocks of 16, 32, 64 maps on 32×32 pixels, no pool.

    shortcut: "A" as the paper here (no parameters more than the plain network), "B", "C" or "none".
    """

    input_size = 32

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, *, shortcut: str = "A", **kwargs
    ):
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            raise ValueError(f"CifarResNet: expected a depth of 6n + 2, got {depth}")
        stem = _conv(in_chans, 16, 3)
        super().__init__(BasicBlock, [n] * 3, 16, num_classes, in_chans, stem, shortcut=shortcut, **kwargs)


_IMAGENET = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}
_CIFAR = (20, 32, 44, 56, 110, 1202)


def _register_imagenet(name: str, depth: int, **fixed) -> None:
    def builder(num_classes: int = 1000, in_chans: int = 3, **kwargs) -> ResNet:
        return ResNet(*_IMAGENET[depth], num_classes, in_chans, **fixed, **kwargs)

    builder.__doc__ = f"{name}; options: see ResNet."
    register_model(builder, name=name)


def _register_cifar(name: str, depth: int, **fixed) -> None:
    def builder(num_classes: int = 10, in_chans: int = 3, **kwargs) -> CifarResNet:
        return CifarResNet(depth, num_classes, in_chans, **fixed, **kwargs)

    builder.__doc__ = f"{name}; options: see CifarResNet."
    register_model(builder, name=name)


for _depth in _IMAGENET:
    _register_imagenet(f"resnet{_depth}", _depth)
for _depth in (18, 34):
    _register_imagenet(f"plain{_depth}", _depth, shortcut="none")
for _depth in _CIFAR:
    _register_cifar(f"resnet{_depth}", _depth)
for _depth in _CIFAR[:-1]:
    _register_cifar(f"plain{_depth}", _depth, shortcut="none")
