"""DenseNet's blocks in a graph: concatenations, each of which begins with the one before.

[x0], [x0, f1], [x0, f1, f2], … become views of one buffer into which every map is written once (Pleiss et al.,
Memory-Efficient Implementation of DenseNets, 2017).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from cuda_cnn import functional
from cuda_cnn import nn as cnn

_CONCATENATIONS = (torch.cat, torch.concat, functional.concat)
_SHORTEST = 3  # concatenations worth a buffer


@dataclass
class Block:
    width: int = 0  # channels of the buffer
    lists: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # concatenation -> all its parts
    # What has been written so far, in the new graph.
    written: int = 0
    buffer: fx.Node | None = None
    maps: fx.Node | None = None
    statistics: tuple[fx.Node, fx.Node] | None = None


def parts_of(node: fx.Node, module_of: Callable[[fx.Node], nn.Module | None]) -> list[fx.Node] | None:
    """The tensors that a concatenation of channels joins; None for any other node."""
    if node.op == "call_function" and node.target in _CONCATENATIONS:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    elif node.op == "call_module" and isinstance(module_of(node), cnn.Concat):
        dim = module_of(node).dim
    else:
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    if dim != 1 or not isinstance(parts, list | tuple) or not all(isinstance(p, fx.Node) for p in parts):
        return None
    return list(parts)


def find_blocks(
    graph: fx.Graph, module_of: Callable[[fx.Node], nn.Module | None]
) -> tuple[dict[fx.Node, Block], list[fx.Node]]:
    """Each concatenation's block, and the chains' last nodes whose width is unknown."""
    chains: list[dict[fx.Node, list[fx.Node]]] = []
    flat: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        parts = parts_of(node, module_of)
        if not parts:
            continue
        flat[node] = [*flat.get(parts[0], parts[:1]), *parts[1:]]
        for chain in chains:
            longest = next(reversed(chain.values()))
            if len(longest) < len(flat[node]) and flat[node][: len(longest)] == longest:
                chain[node] = flat[node]
                break
        else:
            chains.append({node: flat[node]})
    blocks, unknown = {}, []
    for chain in chains:
        if len(chain) < _SHORTEST:
            continue
        last = next(reversed(chain))
        widths = {
            module.num_features for module in map(module_of, last.users) if isinstance(module, nn.BatchNorm2d)
        }
        if len(widths) == 1:
            block = Block(widths.pop(), chain)
            blocks |= dict.fromkeys(chain, block)
        else:
            unknown.append(last)
    return blocks, unknown
