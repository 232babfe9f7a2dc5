"""VGG (Simonyan & Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR
2015)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, Dropout, Linear, Module, ReLU, Sequential, init

from cuda_cnn import nn

from .base import ConvNet
from .registry import register_model

__all__ = ["VGG", "init_from_shallower"]

# Table 1: the convolutions of the five stages, each stage followed by a 2×2/2 max-pool.
# A number is the width of a 3×3 convolution, a pair is (width, kernel size).
_CONFIGS = {
    "vgg11": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "vgg13": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "vgg16c": [[64] * 2, [128] * 2] + [[width, width, (width, 1)] for width in (256, 512, 512)],
    "vgg16": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "vgg19": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


class VGG(ConvNet):
    """3×3 convolutions of stride 1, each with ReLU, in five stages; then 4096-4096-num_classes.

    config: the convolutions of each stage, as in Table 1.
    lrn: local response normalisation after the first convolution (the paper's A-LRN).
    batch_norm: batch normalisation after every convolution (torchvision's `_bn` forms).
    weights_init: "he" (normal, fan-out; torchvision's), "glorot" (uniform; the remedy of the paper's section
    3.1 for
        training without staged pre-training) or "normal" (mean 0, variance 0.01; the paper's for net A).
        Biases are 0; in "he" the fully-connected weights are N(0, 0.01²).
    """

    input_size = 224
    min_size = 32
    window = 7
    head_names = ("avgpool", "classifier")

    def __init__(
        self,
        config: list[list[int | tuple[int, int]]],
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        lrn: bool = False,
        batch_norm: bool = False,
        dropout: float = 0.5,
        weights_init: str = "he",
    ):
        super().__init__(in_chans)
        self.features, self.taps = _features(config, in_chans, lrn, batch_norm)
        self.avgpool = AdaptiveAvgPool2d(7)  # the identity at 224×224; lets other sizes through
        self.classifier = Sequential(
            Linear(512 * 7 * 7, 4096),
            ReLU(inplace=True),
            Dropout(dropout),
            Linear(4096, 4096),
            ReLU(inplace=True),
            Dropout(dropout),
            Linear(4096, num_classes),
        )
        self.reset_parameters(weights_init)

    def reset_parameters(self, weights_init: str) -> None:
        if weights_init not in ("he", "glorot", "normal"):
            raise ValueError(f"VGG: expected weights_init 'he', 'glorot' or 'normal', got {weights_init!r}")
        for layer in self.modules():
            if not isinstance(layer, (torch.nn.Conv2d, Linear)):
                continue
            if weights_init == "glorot":
                init.xavier_uniform_(layer.weight)
            elif weights_init == "normal":
                init.normal_(layer.weight, std=0.1)
            elif isinstance(layer, Linear):
                init.normal_(layer.weight, std=0.01)
            else:
                init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(layer.bias)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield x

    def head(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(x).flatten(1))

    def classifier_layers(self) -> list[Module]:
        return list(self.classifier)


def _features(config, in_chans: int, lrn: bool, batch_norm: bool) -> tuple[Sequential, list[int]]:
    """The convolutional layers, and the places of the pools among them."""
    layers: list[Module] = []
    taps = []
    for stage in config:
        for conv in stage:
            width, kernel = conv if isinstance(conv, tuple) else (conv, 3)
            layers.append(nn.Conv2d(in_chans, width, kernel, padding=kernel // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(ReLU(inplace=True))
            if lrn and not taps:
                layers.append(
                    nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
                )  # AlexNet's: α is divided by n
            in_chans = width
        taps.append(len(layers))
        layers.append(nn.MaxPool2d(2, 2))
    return Sequential(*layers), taps


def init_from_shallower(model: VGG, shallower: VGG) -> None:
    """Staged pre-training (section 3.1): copies the first four convolutions (conv1_1, conv2_1, conv3_1,
    conv3_2 of Table 1) and the three fully-connected layers of a trained net A into a deeper net, in place.

    Raises ValueError where the shapes of a pair differ, before anything is copied.
    """
    pairs = list(zip(_pretrained_layers(model), _pretrained_layers(shallower), strict=True))
    for into, source in pairs:
        if into.weight.shape != source.weight.shape:
            raise ValueError(
                f"init_from_shallower: a layer of shape {list(into.weight.shape)} cannot start from one of "
                f"shape {list(source.weight.shape)} (other num_classes or in_chans?)"
            )
    with torch.no_grad():
        for into, source in pairs:
            into.weight.copy_(source.weight)
            into.bias.copy_(source.bias)


def _pretrained_layers(net: VGG) -> list[Module]:
    starts = [0, *(tap + 1 for tap in net.taps)]
    stages = [
        [layer for layer in net.features[start:end] if isinstance(layer, torch.nn.Conv2d)]
        for start, end in zip(starts, net.taps, strict=False)
    ]
    linear = [layer for layer in net.classifier if isinstance(layer, Linear)]
    return [stages[0][0], stages[1][0], *stages[2][:2], *linear]


def _register(name: str, config_name: str, **fixed) -> None:
    def builder(num_classes: int = 1000, in_chans: int = 3, **kwargs) -> VGG:
        return VGG(_CONFIGS[config_name], num_classes, in_chans, **fixed, **kwargs)

    builder.__doc__ = f"{name}; options: see VGG."
    register_model(builder, name=name)


for _name in _CONFIGS:
    _register(_name, _name)
    _register(f"{_name}_bn", _name, batch_norm=True)
_register("vgg11_lrn", "vgg11", lrn=True)
