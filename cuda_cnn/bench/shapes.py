"""The layers of the classic networks, as the benchmarks run them: `layers("vgg16", op="conv2d")`.

Equal layers of one network are listed once. Sizes are those of the papers (papers' input, one picture).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..models.registry import nearest

__all__ = ["LAYERS", "NETWORKS", "Layer", "layers", "short_name"]


@dataclass(frozen=True)
class Layer:
    """One layer: operator, input (C, H, W), and the operator's arguments."""

    network: str
    name: str
    op: str
    shape: tuple[int, int, int]
    args: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        c, h, w = self.shape
        return f"{self.network}/{self.name} {c}×{h}×{w}{_words(self)}"


def _words(layer: Layer) -> str:
    a = layer.args
    if layer.op == "conv2d":
        groups = f" g{a['groups']}" if a["groups"] > 1 else ""
        return f" → {a['filters']} {a['size']}×{a['size']}/{a['stride']}{groups}"
    return f" {a['size']}/{a['stride']}" if layer.op == "max_pool2d" else ""


def _conv(network: str, *rows: tuple) -> list[Layer]:
    """Rows of name, C, H, filters, size, and optionally stride, padding, groups."""
    found = []
    for name, channels, extent, filters, size, *rest in rows:
        stride, padding, groups = [*rest, *(1, 0, 1)[len(rest) :]]
        args = {"filters": filters, "size": size, "stride": stride, "padding": padding, "groups": groups}
        found.append(Layer(network, name, "conv2d", (channels, extent, extent), args))
    return found


def _plain(network: str, op: str, *rows: tuple, **args) -> list[Layer]:
    """Rows of name, C, H: operators whose arguments are the same in the whole network."""
    return [Layer(network, name, op, (channels, extent, extent), args) for name, channels, extent in rows]


_VGG = [
    *(
        ("conv1_1", 3, 224, 64),
        ("conv1_2", 64, 224, 64),
        ("conv2_1", 64, 112, 128),
        ("conv2_2", 128, 112, 128),
    ),
    *(
        ("conv3_1", 128, 56, 256),
        ("conv3_2", 256, 56, 256),
        ("conv4_1", 256, 28, 512),
        ("conv4_2", 512, 28, 512),
    ),
    ("conv5_1", 512, 14, 512),
]


def _resnet_stage(name: str, inputs: int, extent: int, width: int, stride: int) -> list[tuple]:
    """A bottleneck stage: the first block's convolutions, then those that repeat."""
    after = extent // stride
    return [
        (f"{name}.0.conv1", inputs, extent, width, 1),
        (f"{name}.0.conv2", width, extent, width, 3, stride, 1),
        (f"{name}.0.conv3", width, after, 4 * width, 1),
        (f"{name}.0.downsample", inputs, extent, 4 * width, 1, stride),
        (f"{name}.1.conv1", 4 * width, after, width, 1),
        *([(f"{name}.1.conv2", width, after, width, 3, 1, 1)] if stride > 1 else []),
    ]


def _dense_stage(block: int, inputs: int, extent: int, depth: int) -> list[tuple]:
    """First, middle and last 1×1 of a block with k = 32, its 3×3, and its transition."""
    last = inputs + 32 * (depth - 1)
    stage = [
        (f"block{block}.first", inputs, extent, 128, 1),
        (f"block{block}.last", last, extent, 128, 1),
        (f"block{block}.conv2", 128, extent, 32, 3, 1, 1),
    ]
    transition = [(f"transition{block}", last + 32, extent, (last + 32) // 2, 1)]
    return stage + (transition if block < 4 else [])


LAYERS: tuple[Layer, ...] = (
    *_conv("lenet5", ("c1", 1, 32, 6, 5), ("c3", 6, 14, 16, 5), ("c5", 16, 5, 120, 5), ("f6", 120, 1, 84, 1)),
    *_plain("lenet5", "subsample", ("s2", 6, 28), ("s4", 16, 10)),
    *_conv(
        "alexnet",
        ("conv1", 3, 227, 96, 11, 4),
        ("conv2", 96, 27, 256, 5, 1, 2, 2),
        ("conv3", 256, 13, 384, 3, 1, 1),
    ),
    *_conv("alexnet", ("conv4", 384, 13, 384, 3, 1, 1, 2), ("conv5", 384, 13, 256, 3, 1, 1, 2)),
    *_plain(
        "alexnet", "local_response_norm", ("norm1", 96, 55), ("norm2", 256, 27), size=5, alpha=5e-4, k=2.0
    ),
    *_plain(
        "alexnet",
        "max_pool2d",
        ("pool1", 96, 55),
        ("pool2", 256, 27),
        ("pool5", 256, 13),
        size=3,
        stride=2,
        padding=0,
    ),
    *_conv("vgg16", *[(*row, 3, 1, 1) for row in _VGG]),
    *_plain(
        "vgg16",
        "max_pool2d",
        ("pool1", 64, 224),
        ("pool3", 256, 56),
        ("pool5", 512, 14),
        size=2,
        stride=2,
        padding=0,
    ),
    *_conv("resnet50", ("conv1", 3, 224, 64, 7, 2, 3), *_resnet_stage("layer1", 64, 56, 64, 1)),
    *_conv("resnet50", *_resnet_stage("layer2", 256, 56, 128, 2), *_resnet_stage("layer3", 512, 28, 256, 2)),
    *_conv("resnet50", *_resnet_stage("layer4", 1024, 14, 512, 2)),
    *_plain("resnet50", "batch_norm", ("bn1", 64, 112), ("layer1.bn3", 256, 56), ("layer3.bn1", 256, 14)),
    *_plain("resnet50", "max_pool2d", ("maxpool", 64, 112), size=3, stride=2, padding=1),
    *_conv("densenet121", *_dense_stage(1, 64, 56, 6), *_dense_stage(2, 128, 28, 12)),
    *_conv("densenet121", *_dense_stage(3, 256, 14, 24), *_dense_stage(4, 512, 7, 16)),
    *_plain("densenet121", "batch_norm", ("block1.last", 224, 56), ("block3.last", 992, 14)),
    *_plain("densenet121", "concat", ("block1.last", 192, 56), ("block3.last", 960, 14), grown=32),
    *_conv(
        "googlenet",
        ("conv1", 3, 224, 64, 7, 2, 3),
        ("conv3", 64, 56, 192, 3, 1, 1),
        ("3a.5x5", 16, 28, 32, 5, 1, 2),
    ),
    *_plain(
        "googlenet", "local_response_norm", ("norm1", 64, 56), ("norm2", 192, 56), size=5, alpha=5e-4, k=2.0
    ),
)

NETWORKS: tuple[str, ...] = tuple(dict.fromkeys(layer.network for layer in LAYERS))


def short_name(layer: Layer) -> str:
    return f"{layer.network}/{layer.name}"


def layers(network: str | None = None, op: str | None = None) -> list[Layer]:
    """Those of one network, of one operator, or all. Raises ValueError for an unknown name."""
    for what, name, known in (
        ("network", network, NETWORKS),
        ("operator", op, {layer.op for layer in LAYERS}),
    ):
        if name is not None and name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}")
    return [layer for layer in LAYERS if network in (None, layer.network) and op in (None, layer.op)]
