"""AlexNet (Krizhevsky, Sutskever & Hinton, "ImageNet classification with deep convolutional neural networks",
NIPS 2012), on one device or its two towers on two; and torchvision's variant of 2014."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import (
    AdaptiveAvgPool2d,
    Dropout,
    Identity,
    Linear,
    Module,
    Parameter,
    ReLU,
    Sequential,
    Tanh,
    init,
)

from cuda_cnn import nn

from .base import ConvNet
from .registry import register_model

__all__ = ["AlexNet", "AlexNetTorchvision", "CifarAlexNet", "TwoTowerAlexNet"]


class _AlexNet(ConvNet):
    """What the two single-device forms share: `features`, a 6×6 map, `classifier`."""

    window = 6
    head_names = ("avgpool", "classifier")
    taps: tuple[int, ...]  # the places of the pools in `features`

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield x

    def head(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(x).flatten(1))

    def classifier_layers(self) -> list[Module]:
        return list(self.classifier)


class AlexNet(_AlexNet):
    """The paper's network as one: groups of 2 are its two GPUs, LRN follows ReLU (sections 3.1 to 3.5).

    lrn, overlapped_pooling, dropout=0, activation ("relu" or "tanh"): for the paper's comparisons.
    Initialisation of section 5: N(0, 0.01²); biases 1 in conv2, conv4, conv5 and the hidden fully-connected
    layers.
    """

    input_size = 227  # the paper writes 224; 227 is what gives conv1's 55×55
    min_size = 67
    taps = (3, 7, 14)

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        lrn: bool = True,
        overlapped_pooling: bool = True,
        activation: str = "relu",
        dropout: float = 0.5,
    ):
        super().__init__(in_chans)
        rectify, normalise, pool = _options(lrn, overlapped_pooling, activation)
        self.features = Sequential(
            *(nn.Conv2d(in_chans, 96, 11, stride=4), rectify(), normalise(), pool()),
            *(nn.Conv2d(96, 256, 5, padding=2, groups=2), rectify(), normalise(), pool()),
            *(nn.Conv2d(256, 384, 3, padding=1), rectify()),
            *(nn.Conv2d(384, 384, 3, padding=1, groups=2), rectify()),
            *(nn.Conv2d(384, 256, 3, padding=1, groups=2), rectify(), pool()),
        )
        self.avgpool = AdaptiveAvgPool2d(6)  # the identity at 227×227; lets other sizes through
        self.classifier = Sequential(
            *(Dropout(dropout), Linear(256 * 6 * 6, 4096), rectify()),
            *(Dropout(dropout), Linear(4096, 4096), rectify()),
            Linear(4096, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        conv1, conv2, conv3, conv4, conv5 = (self.features[i] for i in (0, 4, 8, 10, 12))
        fc6, fc7, fc8 = (self.classifier[i] for i in (1, 4, 6))
        for layer in (conv1, conv2, conv3, conv4, conv5, fc6, fc7, fc8):
            init.normal_(layer.weight, std=0.01)
            init.constant_(layer.bias, 1.0 if layer in (conv2, conv4, conv5, fc6, fc7) else 0.0)


def _options(lrn: bool, overlapped_pooling: bool, activation: str) -> tuple[Callable[[], Module], ...]:
    """What makes a layer's activation, its normalisation, and its pooling."""
    if activation not in ("relu", "tanh"):
        raise ValueError(f"AlexNet: expected activation 'relu' or 'tanh', got {activation!r}")

    def rectify() -> Module:
        return ReLU(inplace=True) if activation == "relu" else Tanh()

    def normalise() -> Module:  # α is divided by n here: the paper's 1e-4
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0) if lrn else Identity()

    def pool() -> Module:
        return nn.MaxPool2d(3 if overlapped_pooling else 2, stride=2)

    return rectify, normalise, pool


class CifarAlexNet(ConvNet):
    """The small network of sections 3.1 and 3.3: four layers, three 5×5 convolutions of 32, 32 and 64 maps and a
    linear one, for the paper's comparisons at small scale. The paper gives no widths; these are cuda-convnet's.

    lrn, overlapped_pooling, activation, dropout: as AlexNet's; batch_norm: after every convolution.
    He initialisation.
    """

    input_size = 32
    min_size = 15
    window = 3
    head_names = ("avgpool", "dropout", "fc")
    taps = (4, 9, 14)

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        lrn: bool = True,
        overlapped_pooling: bool = True,
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(in_chans)
        rectify, normalise, pool = _options(lrn, overlapped_pooling, activation)
        layers: list[Module] = []
        for planes, width in ((in_chans, 32), (32, 32), (32, 64)):
            norm = nn.BatchNorm2d(width) if batch_norm else Identity()
            layers += [nn.Conv2d(planes, width, 5, padding=2), norm, rectify(), normalise(), pool()]
        self.features = Sequential(*layers)
        self.avgpool = AdaptiveAvgPool2d(3)  # the identity at 32×32 with overlapped pools
        self.dropout = Dropout(dropout)
        self.fc = Linear(64 * 3 * 3, num_classes)
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d | Linear):
                init.kaiming_normal_(layer.weight)
                init.zeros_(layer.bias)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield x

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))

    def classifier_layers(self) -> list[Module]:
        return [self.dropout, self.fc]


class AlexNetTorchvision(_AlexNet):
    """torchvision's `alexnet`: one tower, without LRN ("One weird trick", Krizhevsky, 2014). PyTorch's own
    initialisation."""

    input_size = 224
    min_size = 63
    taps = (2, 5, 12)

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, *, dropout: float = 0.5):
        super().__init__(in_chans)
        self.features = Sequential(
            *(
                nn.Conv2d(in_chans, 64, 11, stride=4, padding=2),
                ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2),
            ),
            *(nn.Conv2d(64, 192, 5, padding=2), ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(192, 384, 3, padding=1), ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, 3, padding=1), ReLU(inplace=True)),
            *(nn.Conv2d(256, 256, 3, padding=1), ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        )
        self.avgpool = AdaptiveAvgPool2d(6)
        self.classifier = Sequential(
            *(Dropout(dropout), Linear(256 * 6 * 6, 4096), ReLU(inplace=True)),
            *(Dropout(dropout), Linear(4096, 4096), ReLU(inplace=True)),
            Linear(4096, num_classes),
        )


class TwoTowerAlexNet(ConvNet):
    """The paper's network with a half of every layer's units on each of two devices (Figure 2).

    Tower t holds the t-th half of every weight's rows. conv2, conv4 and conv5 read their own device's maps
    only; conv3 and the fully-connected layers read both; LRN reads the two maps of the other tower that its
    window reaches. Equal to AlexNet in its outputs, dropout masks apart; `state_dict` and `load_state_dict`
    speak AlexNet's names and whole tensors, so that checkpoints pass between the two forms.
    """

    input_size = AlexNet.input_size
    min_size = AlexNet.min_size
    head_names = ()

    def __init__(self, whole: AlexNet, devices: Sequence[str | torch.device]):
        super().__init__(whole.in_chans)
        if len(devices) != 2:
            raise ValueError(f"AlexNet: expected two devices, got {len(devices)} ({list(devices)})")
        self.devices = [torch.device(device) for device in devices]
        self.towers = torch.nn.ModuleList(_half(whole, t).to(device) for t, device in enumerate(self.devices))
        self.register_state_dict_post_hook(_merge_towers)
        self.register_load_state_dict_pre_hook(_split_towers)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        for halves in self._stages(x):
            last = halves
        return self._classify(last)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for halves in self._stages(x):
            yield self._both(halves)[0]

    def _stages(self, x: Tensor) -> Iterator[list[Tensor]]:
        halves = [x.to(device) for device in self.devices]
        convolutions = 0
        for i, layers in enumerate(zip(*(tower.features for tower in self.towers), strict=True)):
            if isinstance(layers[0], torch.nn.LocalResponseNorm):
                halves = self._normalise(layers, halves)
                continue
            if isinstance(layers[0], torch.nn.Conv2d):
                convolutions += 1
                if convolutions == 3:
                    halves = self._both(halves)
            halves = self._run(layers, halves)
            if i in AlexNet.taps:
                yield halves

    def _classify(self, halves: list[Tensor]) -> Tensor:
        halves = [tower.avgpool(half).flatten(1) for tower, half in zip(self.towers, halves, strict=True)]
        for layers in zip(*(tower.classifier for tower in self.towers), strict=True):
            if isinstance(layers[0], Linear):
                halves = self._both(halves)
            halves = self._run(layers, halves)
        return self._both(halves)[0]

    def _run(self, layers: Sequence[Module], halves: list[Tensor]) -> list[Tensor]:
        return [layer(half) for layer, half in zip(layers, halves, strict=True)]

    def _both(self, halves: list[Tensor]) -> list[Tensor]:
        """Both towers' maps on each device."""
        return [torch.cat([half.to(device) for half in halves], 1) for device in self.devices]

    def _normalise(self, layers: Sequence[Module], halves: list[Tensor]) -> list[Tensor]:
        reach = layers[0].size // 2
        first, second = halves
        below = torch.cat([first, second[:, :reach].to(first.device)], 1)
        above = torch.cat([first[:, -reach:].to(second.device), second], 1)
        return [layers[0](below)[:, :-reach], layers[1](above)[:, reach:]]


def _half(whole: AlexNet, tower: int) -> AlexNet:
    """A copy with the tower's half of every weight's rows."""
    half = copy.deepcopy(whole)
    for layer in half.modules():
        if not isinstance(layer, (torch.nn.Conv2d, Linear)):
            continue
        for name in ("weight", "bias"):
            rows = getattr(layer, name).detach().tensor_split(2)[tower]
            setattr(layer, name, Parameter(rows.clone()))
        if isinstance(layer, Linear):
            layer.out_features = len(layer.bias)
        else:
            layer.out_channels, layer.in_channels, layer.groups = *layer.weight.shape[:2], 1
    return half


def _merge_towers(module: Module, state: dict, prefix: str, _metadata) -> None:
    first, second = f"{prefix}towers.0.", f"{prefix}towers.1."
    for key in [key for key in state if key.startswith(first)]:
        name = key.removeprefix(first)
        rows = state.pop(key)
        state[prefix + name] = torch.cat([rows, state.pop(second + name).to(rows.device)])


def _split_towers(module: Module, state: dict, prefix: str, *_unused) -> None:
    names = [name for name, _ in module.towers[0].named_parameters() if prefix + name in state]
    for name in names:
        halves = state.pop(prefix + name).tensor_split(2)
        for tower, rows in enumerate(halves):
            state[f"{prefix}towers.{tower}.{name}"] = rows


@register_model
def alexnet(
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    devices: Sequence[str | torch.device] | None = None,
    **kwargs,
) -> AlexNet | TwoTowerAlexNet:
    """The paper's network. devices: two of them put one tower on each; other options: see AlexNet."""
    whole = AlexNet(num_classes, in_chans, **kwargs)
    return whole if devices is None else TwoTowerAlexNet(whole, devices)


@register_model
def alexnet_cifar(num_classes: int = 10, in_chans: int = 3, **kwargs) -> CifarAlexNet:
    """The four-layer network of the paper's comparisons; options: see CifarAlexNet."""
    return CifarAlexNet(num_classes, in_chans, **kwargs)


@register_model
def alexnet_torchvision(
    num_classes: int = 1000, in_chans: int = 3, *, dropout: float = 0.5
) -> AlexNetTorchvision:
    """torchvision's one-tower form, for its weights."""
    return AlexNetTorchvision(num_classes, in_chans, dropout=dropout)
