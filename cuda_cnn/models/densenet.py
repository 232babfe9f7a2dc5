"""DenseNet (Huang, Liu, van der Maaten & Weinberger, "Densely connected convolutional networks", CVPR 2017),
with the memory-efficient training of Pleiss et al. ("Memory-efficient implementation of DenseNets", 2017)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import AvgPool2d, Linear, Module, ModuleDict, ReLU, Sequential, init
from torch.utils.checkpoint import checkpoint

from cuda_cnn import functional, nn
from cuda_cnn.convert import register_torch_form
from cuda_cnn.ops.concat import channel_buffer

from .base import ConvNet
from .registry import register_model

__all__ = ["DenseBlock", "DenseNet"]


class _Append(torch.autograd.Function):
    """A block's maps with the next layer's behind them.

    All results of one block are views of one NHWC buffer, each longer than the one before; `new` is written
    behind `maps`, which is there already. Autograd must take them for tensors of their own: the write leaves
    the earlier maps as they were, yet a shared version counter would forbid their use in the backward pass.
    `.data` gives each its own.
    """

    @staticmethod
    def forward(ctx, maps: Tensor | None, new: Tensor, buffer: Tensor) -> Tensor:
        ctx.first = 0 if maps is None else maps.shape[1]
        ctx.dtype = new.dtype
        end = ctx.first + new.shape[1]
        functional.write_channels_(buffer.data, new.to(buffer.dtype), ctx.first)
        return buffer.data[:, :end]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[:, : ctx.first] if ctx.first else None, grad[:, ctx.first :].to(ctx.dtype), None


class DenseLayer(Module):
    """BN, ReLU, 1×1 convolution of bn_size·k maps, BN, ReLU, 3×3 convolution: the layer's k new maps.

    bn_size 0 leaves BN, ReLU, 3×3.
    """

    def __init__(
        self, in_planes: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_planes)
        self.relu1 = ReLU(inplace=True)
        self.bottleneck = bn_size > 0
        if self.bottleneck:
            width = bn_size * growth_rate
            self.conv1 = nn.Conv2d(in_planes, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_planes, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def forward(self, maps: Tensor) -> Tensor:
        run = self._recomputed if self.memory_efficient and _in_plain_eager(maps) else self._plainly
        new = run(self.norm1, self.relu1, self.conv1, maps)
        if self.bottleneck:
            new = run(self.norm2, self.relu2, self.conv2, new)
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new

    @staticmethod
    def _plainly(norm: Module, relu: Module, conv: Module, x: Tensor) -> Tensor:
        return conv(relu(norm(x)))

    def _recomputed(self, norm: Module, relu: Module, conv: Module, x: Tensor) -> Tensor:
        """The same, with the normalised maps computed again in the backward pass instead of kept."""
        return checkpoint(
            *(self._plainly, norm, relu, conv, x),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), _SameBatchAgain(norm)),
        )


class DenseBlock(ModuleDict):
    """Layer l reads the maps of all before it: L(L+1)/2 connections (section 3)."""

    def __init__(self, num_layers: int, in_planes: int, growth_rate: int, **layer_options):
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(in_planes + i * growth_rate, growth_rate, **layer_options)
        self.in_planes = in_planes
        self.growth_rate = growth_rate
        self.out_planes = in_planes + num_layers * growth_rate

    @property
    def connections(self) -> int:
        """How many pairs of a source (the block's input or an earlier layer) and a layer that reads it."""
        earlier_layers = (
            (layer.norm1.num_features - self.in_planes) // self.growth_rate for layer in self.values()
        )
        return sum(1 + count for count in earlier_layers)

    def forward(self, x: Tensor) -> Tensor:
        if not _in_plain_eager(x):
            for layer in self.values():
                x = functional.concat([x, layer(x)], 1)
            return x
        buffer = channel_buffer(x, self.out_planes)
        maps = _Append.apply(None, x, buffer)
        for layer in self.values():
            maps = _Append.apply(maps, layer(maps), buffer)
        return maps


class TorchDenseBlock(DenseBlock):
    """The same with torch's concatenations."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x


register_torch_form(TorchDenseBlock, DenseBlock, "concat")


def _in_plain_eager(x: Tensor) -> bool:
    """False under tracing, compilation and functorch transforms: those must see concatenations."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


class _SameBatchAgain:
    """Context of a second pass over a batch: running statistics and batch counter stay as they are."""

    def __init__(self, norm: Module):
        self.norm = norm

    def __enter__(self) -> None:
        self.momentum = self.norm.momentum
        self.norm.momentum = 0.0

    def __exit__(self, *_exception) -> None:
        self.norm.momentum = self.momentum
        if self.norm.training and self.norm.track_running_stats:
            self.norm.num_batches_tracked -= 1


class Transition(Sequential):
    """BN, ReLU, 1×1 convolution, 2×2 average pool (section 3)."""

    def __init__(self, in_planes: int, planes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_planes)
        self.relu = ReLU(inplace=True)
        self.conv = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.pool = AvgPool2d(2, stride=2)


class DenseNet(ConvNet):
    """Dense blocks with transitions between them, global average pool, one linear layer; torchvision's names.

    blocks: the number of layers of each block. growth_rate: the paper's k. init_planes: maps of the first
        convolution. bn_size: 1×1 convolutions give bn_size·k maps; 0 leaves them out (DenseNet without B).
    compression: the paper's θ.
    cifar_stem: 3×3 without pool, for 32×32 images.
    drop_rate: dropout after each layer (0.2 in section 4.2 where the data is not augmented).
    memory_efficient: training keeps no normalised map of the blocks, but computes them again in the backward
        pass: the same numbers, less memory, more time. Without effect under `torch.compile`, which decides
        by itself what to keep.
    """

    head_names = ("classifier",)

    def __init__(
        self,
        blocks: tuple[int, ...],
        growth_rate: int,
        init_planes: int,
        num_classes: int,
        in_chans: int,
        *,
        bn_size: int = 4,
        compression: float = 0.5,
        cifar_stem: bool = False,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
    ):
        super().__init__(in_chans)
        if not 0 < compression <= 1:
            raise ValueError(f"DenseNet: expected 0 < compression ≤ 1, got {compression}")
        if growth_rate < 1 or min(blocks, default=0) < 1:
            raise ValueError(
                f"DenseNet: expected growth_rate ≥ 1 and layers in every block, got {growth_rate}, {blocks}"
            )
        self.input_size = 32 if cifar_stem else 224
        # Each transition halves; the ImageNet stem divides by four, rounding up.
        self.min_size = 2 ** (len(blocks) - 1) if cifar_stem else 4 * 2 ** (len(blocks) - 1) - 3
        self.features = Sequential()
        self.taps = []
        if cifar_stem:
            self.features.conv0 = nn.Conv2d(in_chans, init_planes, 3, padding=1, bias=False)
        else:
            self.features.conv0 = nn.Conv2d(in_chans, init_planes, 7, stride=2, padding=3, bias=False)
            self.features.norm0 = nn.BatchNorm2d(init_planes)
            self.features.relu0 = ReLU(inplace=True)
            self.taps.append("relu0")
            self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        planes = init_planes
        for i, num_layers in enumerate(blocks, start=1):
            options = {"bn_size": bn_size, "drop_rate": drop_rate, "memory_efficient": memory_efficient}
            block = DenseBlock(num_layers, planes, growth_rate, **options)
            self.features.add_module(f"denseblock{i}", block)
            planes = block.out_planes
            if i < len(blocks):
                self.taps.append(f"denseblock{i}")
                self.features.add_module(f"transition{i}", Transition(planes, int(planes * compression)))
                planes = int(planes * compression)
        self.features.add_module(f"norm{len(blocks) + 1}", nn.BatchNorm2d(planes))
        self.classifier = Linear(planes, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal (fan-in); the linear layer's biases 0."""
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                init.kaiming_normal_(layer.weight)
        init.zeros_(self.classifier.bias)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for name, layer in self.features.named_children():
            x = layer(x)
            if name in self.taps:
                yield x
        yield F.relu(x, inplace=True)

    def head(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def classifier_layers(self) -> list[Module]:
        return [self.classifier]


_IMAGENET = {
    121: (32, 64, (6, 12, 24, 16)),
    161: (48, 96, (6, 12, 36, 24)),
    169: (32, 64, (6, 12, 32, 32)),
    201: (32, 64, (6, 12, 48, 32)),
    264: (32, 64, (6, 12, 64, 48)),
}


def _register_imagenet(depth: int) -> None:
    default_growth_rate, default_init_planes, default_blocks = _IMAGENET[depth]

    def builder(
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        growth_rate: int = default_growth_rate,
        init_planes: int = default_init_planes,
        blocks: tuple[int, ...] = default_blocks,
        **kwargs,
    ) -> DenseNet:
        return DenseNet(tuple(blocks), growth_rate, init_planes, num_classes, in_chans, **kwargs)

    builder.__doc__ = f"DenseNet-{depth} (Table 1); options: see DenseNet."
    register_model(builder, name=f"densenet{depth}")


def _cifar(num_classes: int, in_chans: int, depth: int, growth_rate: int, bn_size: int, **kwargs) -> DenseNet:
    """Three blocks on 32×32 pixels (section 3, "Implementation details"): `depth` counts the first
    convolution, the transitions and the linear layer too. BC starts with 2k maps, the plain form with 16."""
    layers, rest = divmod(depth - 4, 6 if bn_size else 3)
    if rest or layers < 1:
        form = "6n + 4 with bottlenecks" if bn_size else "3n + 4 without bottlenecks"
        raise ValueError(f"DenseNet: expected a depth of {form}, got {depth}")
    init_planes = kwargs.pop("init_planes", 2 * growth_rate if bn_size else 16)
    options = {"bn_size": bn_size, "cifar_stem": True, **kwargs}
    return DenseNet((layers,) * 3, growth_rate, init_planes, num_classes, in_chans, **options)


for _depth in _IMAGENET:
    _register_imagenet(_depth)


@register_model
def densenet40_12(
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    depth: int = 40,
    growth_rate: int = 12,
    compression: float = 1.0,
    **kwargs,
) -> DenseNet:
    """The CIFAR form without bottlenecks and compression; options: see DenseNet."""
    return _cifar(
        num_classes, in_chans, depth, growth_rate, **{"bn_size": 0, "compression": compression, **kwargs}
    )


@register_model
def densenet_bc100_12(
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    depth: int = 100,
    growth_rate: int = 12,
    compression: float = 0.5,
    **kwargs,
) -> DenseNet:
    """The CIFAR form with bottlenecks and compression; options: see DenseNet."""
    return _cifar(
        num_classes, in_chans, depth, growth_rate, **{"bn_size": 4, "compression": compression, **kwargs}
    )
