"""The demo's table: every operator on a layer of each network, our time beside torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from .cases import WrongResultError, build, vendor
from .shapes import layers
from .timing import compare

__all__ = ["DEMO_LAYERS", "rows"]

# network, layer, batch: every operator and every network, each row well under a second.
DEMO_LAYERS = (
    *(("lenet5", "c3", 64), ("lenet5", "s2", 64), ("alexnet", "conv2", 4), ("alexnet", "norm1", 4)),
    *(("alexnet", "pool1", 4), ("vgg16", "conv3_2", 2), ("vgg16", "conv5_1", 4), ("resnet50", "conv1", 2)),
    *(("resnet50", "layer1.1.conv1", 4), ("resnet50", "layer3.1.conv2", 4), ("resnet50", "layer1.bn3", 4)),
    *(("densenet121", "block3.conv2", 4), ("densenet121", "block1.last", 4)),
)
COLUMNS = f"{'layer':36} {'pass':8} {'ours':>9} {'torch':>9}"
HEADER = f"{COLUMNS}  {'× torch (quartiles)':24} {'error':>7}  torch's kernel"


def rows(seconds: float = 0.3) -> Iterator[str]:
    """Lines of text: a header, then a line for each layer and pass, as they are measured."""
    yield HEADER
    for network, name, batch in DEMO_LAYERS:
        for layer in layers(network):
            if layer.name != name:
                continue
            for backward in (False, True):
                yield _row(layer, batch, backward, seconds)
    yield f"float32, channels_last, {torch.get_num_threads()} threads; × above 1: ours is faster; train: with"
    yield "all gradients; error: the largest one against float64, over the largest value."
    if note := busy():
        yield note


def busy() -> str:
    """A note where other programs keep the processor busy; empty where not."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores + 1:
        return ""
    return f"The machine was busy (load {load:.1f} on {cores} cores): do not trust these times, run it again."


def _row(layer, batch: int, backward: bool, seconds: float) -> str:
    try:
        case = build(layer, batch, backward)
    except WrongResultError as error:
        return f"WRONG, not timed: {error}"
    times = compare(case.ours, case.rival, seconds)
    middle, low, high = times.ratio
    return (
        f"{f'{layer.network} {layer.name} {layer.op}':36.36} {'train' if backward else 'forward':8} "
        f"{1e3 * times.ours_median:6.2f} ms {1e3 * times.rival_median:6.2f} ms  "
        f"{f'{middle:.2f} ({low:.2f} to {high:.2f})':24} {case.ours_error:7.0e}  {vendor(layer.op)}"
    )
