"""The demo's table: every operator on a layer of each network, our time beside torch's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .cases import Problem
from .machine import busy
from .rivals import vendor
from .run import Settings, row_of
from .shapes import Layer, layers

__all__ = ["DEMO_LAYERS", "rows"]

# network, layer, batch: every operator and every network, each row well under a second.
DEMO_LAYERS = (
    *(("lenet5", "c3", 64), ("lenet5", "s2", 64), ("alexnet", "features.4", 4), ("alexnet", "features.2", 4)),
    *(("alexnet", "features.3", 4), ("vgg16", "features.12", 2), ("vgg16", "features.24", 4)),
    *(("resnet50", "conv1", 2), ("resnet50", "layer1.1.conv1", 4), ("resnet50", "layer3.1.conv2", 4)),
    *(("resnet50", "layer1.0.bn3", 4), ("densenet121", "features.denseblock3.denselayer1.conv2", 4)),
    *(("densenet121", "features.denseblock1", 4), ("googlenet", "inception3a.branch3.1.conv", 4)),
)
COLUMNS = f"{'layer':36} {'pass':8} {'ours':>9} {'torch':>9}"
HEADER = f"{COLUMNS}  {'× torch (95 % of median)':24} {'error':>7}  torch's kernel"


def rows(seconds: float = 0.3) -> Iterator[str]:
    """Lines of text: a header, then a line for each layer and pass, as they are measured."""
    yield HEADER
    for network, name, batch in DEMO_LAYERS:
        layer = next(layer for layer in layers(network) if layer.name == name)
        for direction in ("forward", "full"):
            yield _row(layer, batch, direction, Settings(seconds=seconds, memory=False))
    yield f"float32, channels_last, {torch.get_num_threads()} threads; × above 1: ours is faster; train: with"
    yield "all gradients; error: the largest one against float64, over the largest value."
    if note := busy():
        yield note


def _row(layer: Layer, batch: int, direction: str, settings: Settings) -> str:
    row = row_of(Problem(layer, batch), direction, "e2e", settings)
    if row["wrong"]:
        return f"WRONG, not timed: {next(iter(row['wrong'].values()))}"
    ours, theirs = (row["times"][name] for name in ("cuda_cnn", "torch"))
    middle, _, _, least, most = row["ratios"]["torch"]
    return (
        f"{f'{layer.network} {layer.name} {layer.op}'[-36:]:36} {'train' if direction == 'full' else 'forward':8} "
        f"{1e3 * ours['seconds'][0]:6.2f} ms {1e3 * theirs['seconds'][0]:6.2f} ms  "
        f"{f'{middle:.2f} ({least:.2f} to {most:.2f})':24} {ours['error']:7.0e}  {vendor(layer.op)}"
    )
