"""A traced graph written anew, with layers put together.

The graph is walked once. A value that is not yet a tensor, because a later layer may take part of its work, is a
`Pending`: a convolution still to be made, or a tensor with a scale and shift (a batch normalisation) still to be
applied, then perhaps a sum and a ReLU. A convolution applies scale, shift and ReLU on its load; whatever else reads
the value makes it a tensor first, so that every graph is right, and the known ones are fast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from cuda_cnn.fuse import layers
from cuda_cnn.fuse.dense import Block, find_blocks
from cuda_cnn.fuse.report import Report, Row
from cuda_cnn.fuse.trace import CONVOLUTIONS, NORMS, POOLS, has_hooks, is_norm_with_activation
from cuda_cnn.ops.concat import channel_buffer

_RELUS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)
_ADDS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Convolution:
    """Not yet in the new graph; a Linear is one of one pixel. A norm behind it by the running statistics, or by the
    batch's (a 1×1 one's)."""

    node: fx.Node
    input: Value
    norm: fx.Node | None = None


@dataclass(frozen=True)
class Pending:
    """relu(scale · core + shift + residual), each of them perhaps missing; core may be a Convolution. Or a batch
    normalisation that is a pass of its own in the place of scale and shift."""

    core: fx.Node | Convolution
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    residual: Value | None = None
    relu: bool = False
    on_load: bool = False  # every reader is a convolution that can apply scale, shift and ReLU itself
    norm: fx.Node | None = None

    @property
    def open(self) -> bool:
        """Whether a sum may still join."""
        return self.residual is None and not self.relu


Value = fx.Node | Pending


class Rewriter:
    def __init__(self, root: nn.Module, graph: fx.Graph, opaque: dict[str, str], recompute: bool) -> None:
        self.recompute = recompute
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.old, self.new = graph, fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.made: dict[int, fx.Node] = {}  # id of a Pending -> its tensor
        self.statistics: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.report = Report("training" if root.training else "inference")
        self.used: list[nn.Module] = []
        self.blocks, unknown = find_blocks(graph, self.module_of)
        for name, reason in opaque.items():
            self.left(name, reason)
        for node in unknown:
            self.left(node.name, "a dense block of unknown width: concatenated")

    # ---- What a node is ------------------------------------------------------------------------------------

    def module_of(self, node: Any) -> nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.modules.get(str(node.target))

    def obstacle(self, node: fx.Node, kinds: tuple[type, ...]) -> str | None:
        """Why a layer of these kinds (or a subclass) is not taken; None: it is."""
        module = self.module_of(node)
        if type(module) not in kinds and not (kinds is NORMS and is_norm_with_activation(module)):
            return f"a {type(module).__name__}, not exactly a {kinds[0].__name__}"
        if has_hooks(module):
            return "it has hooks"
        if "forward" in module.__dict__:
            return "its forward is replaced"
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "it is called with more than one tensor"
        return None

    def is_conv(self, node: fx.Node) -> bool:
        return self.conv_obstacle(node) is None

    def conv_obstacle(self, node: fx.Node) -> str | None:
        reason = self.obstacle(node, CONVOLUTIONS)
        if reason:
            return reason
        module = self.module_of(node)
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        odd = any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return "padding 'same' of an even kernel" if module.padding == "same" and odd else None

    def is_norm(self, node: fx.Node) -> bool:
        return self.norm_obstacle(node) is None

    def norm_obstacle(self, node: fx.Node) -> str | None:
        reason = self.obstacle(node, NORMS)
        if reason is None and is_norm_with_activation(module := self.module_of(node)):
            known = isinstance(module.drop, nn.Identity) and isinstance(module.act, nn.ReLU | nn.Identity)
            reason = None if known else f"{type(module.act).__name__} or dropout inside"
        return reason

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self.obstacle(node, (nn.ReLU,)) is None
        if node.op == "call_function":
            return node.target in _RELUS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    @staticmethod
    def is_add(node: fx.Node) -> bool:
        known = (node.op == "call_function" and node.target in _ADDS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        return (
            known
            and len(node.args) == 2
            and all(isinstance(a, fx.Node) for a in node.args)
            and not node.kwargs
        )

    def uses_batch(self, norm: nn.Module) -> bool:
        return norm.training or (norm.running_mean is None and norm.running_var is None)

    def rectifies(self, node: fx.Node) -> bool:
        """A norm with a ReLU of its own."""
        module = self.module_of(node)
        return is_norm_with_activation(module) and isinstance(module.act, nn.ReLU)

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def read_by_convolutions(self, node: fx.Node) -> bool:
        """Whether all that reads a norm's result, perhaps behind one ReLU, are convolutions without groups."""
        reader = self.only_reader(node)
        if reader is not None and self.is_relu(reader):
            node = reader
        return bool(node.users) and all(
            self.is_conv(user) and self.module_of(user).groups == 1 for user in node.users
        )

    # ---- The new graph -------------------------------------------------------------------------------------

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            self.values[node] = self.visit(node)
            if not node.users:  # nobody reads it, but a norm moves its running statistics
                self.tensor(self.values[node])
        place = {name: i for i, n in enumerate(self.old.nodes) for name in (n.name, str(n.target))}
        self.report.fused.sort(key=lambda row: place[row.layer])
        return self.new

    def visit(self, node: fx.Node) -> Value:
        if node in self.blocks:
            return self.grow(node, self.blocks[node])
        module = self.module_of(node)
        if isinstance(module, nn.Conv2d):
            reason = self.conv_obstacle(node)
            return self.copy(node, reason) if reason else self.convolution(node)
        if isinstance(module, nn.BatchNorm2d) or is_norm_with_activation(module):
            reason = self.norm_obstacle(node)
            return self.copy(node, reason) if reason else self.norm(node)
        if isinstance(module, nn.Linear) and not self.obstacle(node, (nn.Linear,)):
            return Pending(Convolution(node, self.values[node.args[0]]))
        if isinstance(module, POOLS) and not self.obstacle(node, POOLS) and not module.return_indices:
            return self.call(layers.max_pool, self.tensor(self.values[node.args[0]]), self.attribute(node))
        if self.is_relu(node):
            return self.relu(node)
        return self.add(node) if self.is_add(node) else self.copy(node)

    def call(self, function: Callable, *args: Any) -> fx.Node:
        return self.new.call_function(function, args)

    def attribute(self, node: fx.Node) -> fx.Node:
        """The module that a node calls, as a node of the new graph."""
        name = str(node.target)
        if name not in self.attributes:
            # In one step: a path would be followed at every call.
            self.attributes[name] = self.new.create_node("get_attr", f"layer_{node.name}")
            self.attributes[name].meta["layer"] = name
            self.used.append(self.modules[name])
        return self.attributes[name]

    def copy(self, node: fx.Node, reason: str | None = None) -> fx.Node:
        if reason:
            self.left(str(node.target), reason)
        if self.writes(node):  # what is still to be made must read what was there before
            for other, value in list(self.values.items()):
                if any(user not in self.values for user in other.users):
                    self.tensor(value)
        return self.new.node_copy(node, lambda n: self.tensor(self.values[n]))

    def writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self.module_of(node), "inplace", False)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        in_place = name.endswith("_") or (node.target in vars(operator).values() and name[0] == "i")
        return node.op in ("call_function", "call_method") and (in_place or bool(node.kwargs.get("inplace")))

    def fused(self, node: fx.Node, what: str) -> None:
        self.report.fused.append(Row(str(node.target), what))

    def left(self, name: str, reason: str) -> None:
        self.report.left.append(Row(name, reason))

    # ---- Layers --------------------------------------------------------------------------------------------

    def convolution(self, node: fx.Node) -> Value:
        module, value = self.module_of(node), self.values[node.args[0]]
        norm = self.only_reader(node)
        batch = norm is not None and self.is_norm(norm) and self.uses_batch(self.module_of(norm))
        if not batch or not self.recompute:
            return Pending(Convolution(node, value))
        if not self.read_by_convolutions(norm) and self.is_pointwise(module):
            return Pending(Convolution(node, value))
        return self.with_statistics(node, value)

    @staticmethod
    def is_pointwise(module: nn.Conv2d) -> bool:
        """For layers.conv_norm: 1×1, and no fewer channels out than in, or its extra products cost too much."""
        return (
            module.kernel_size == (1, 1)
            and module.padding in ((0, 0), "valid", "same")
            and module.stride[0] == module.stride[1]
            and module.groups == 1
            and module.bias is None
            and module.in_channels <= module.out_channels
        )

    def with_statistics(self, node: fx.Node, value: Value) -> fx.Node:
        x, *prologue = self.load(value)
        y, *statistics = self.of_maps(x, node, prologue, True) or self.parts(
            self.call(layers.conv_with_statistics, x, self.attribute(node), *prologue), 3
        )
        self.statistics[y] = tuple(statistics)
        self.fused(node, self.on_load(prologue) + "statistics in its epilogue")
        return y

    def parts(self, result: fx.Node, count: int) -> list[fx.Node]:
        return [self.call(operator.getitem, result, i) for i in range(count)]

    @staticmethod
    def on_load(prologue: list) -> str:
        scale, _, relu = prologue
        if scale is None:
            return "ReLU on its load, " if relu else ""
        return f"norm{' and ReLU' if relu else ''} on its load, "

    def norm(self, node: fx.Node) -> Value:
        module, value = self.module_of(node), self.values[node.args[0]]
        relu, kept = self.rectifies(node), self.uses_batch(module) and not self.recompute
        if (
            not kept
            and isinstance(value, Pending)
            and isinstance(value.core, Convolution)
            and value.core.norm is None
            and value.open
            and self.only_reader(node.args[0]) is node
        ):
            self.fused(
                node, "by its convolution" if self.uses_batch(module) else "folded into its convolution"
            )
            return Pending(replace(value.core, norm=node), relu=relu)
        x = self.tensor(value)
        if kept and x not in self.statistics:
            self.fused(node, "one pass with what follows, kept")
            return Pending(x, norm=self.attribute(node), relu=relu)
        if self.uses_batch(module):
            vectors = self.call(layers.normalise, self.attribute(node), x, *self.statistics_of(x))
        else:
            vectors = self.call(layers.frozen, self.attribute(node), x)
        scale, shift = self.parts(vectors, 2)
        on_load = self.read_by_convolutions(node)
        self.fused(node, "on the load of the next convolution" if on_load else "one pass with what follows")
        return Pending(x, scale, shift, relu=relu, on_load=on_load)

    def statistics_of(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        if x not in self.statistics:
            self.statistics[x] = tuple(self.parts(self.call(layers.statistics, x), 2))
        return self.statistics[x]

    def absorbs(self, node: Any) -> bool:
        """Whether the one that reads this value may join it."""
        value = self.values[node]
        return (
            isinstance(value, Pending) and value.open and len(node.users) == 1 and not self.is_linear(value)
        )

    def is_linear(self, value: Pending) -> bool:
        return isinstance(value.core, Convolution) and isinstance(self.module_of(value.core.node), nn.Linear)

    def relu(self, node: fx.Node) -> Value:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return self.copy(node)
        value = self.values[source]
        if isinstance(value, Pending) and not value.relu and len(source.users) == 1:
            return replace(value, relu=True)
        return self.copy(node)

    def add(self, node: fx.Node) -> Value:
        left, right = node.args
        # In place, what is written must be a value of its own, which nobody else reads.
        if self.writes(node) and not (len(left.users) == 1 and isinstance(self.values[left], Pending)):
            return self.copy(node)
        for taker, other in ((left, right), (right, left)):
            if left is not right and self.absorbs(taker) and not self.values[taker].on_load:
                return replace(self.values[taker], residual=self.values[other])
        return self.copy(node)

    # ---- Making tensors ------------------------------------------------------------------------------------

    def load(self, value: Value) -> tuple[fx.Node, fx.Node | None, fx.Node | None, bool]:
        """(x, scale, shift, relu): how a convolution reads a value."""
        if isinstance(value, Pending) and value.on_load and id(value) not in self.made:
            return value.core, value.scale, value.shift, value.relu
        return self.tensor(value), None, None, False

    def tensor(self, value: Value) -> fx.Node:
        if isinstance(value, fx.Node):
            return value
        if id(value) not in self.made:
            self.made[id(value)] = self.make(value)
        return self.made[id(value)]

    def make(self, value: Pending) -> fx.Node:
        residual = None if value.residual is None else self.tensor(value.residual)
        tail = (residual, value.relu)
        if value.norm is not None:
            return self.call(layers.batch_norm, value.core, value.norm, *tail)
        if isinstance(value.core, fx.Node):
            return self.call(layers.apply, value.core, value.scale, value.shift, *tail)
        conv = value.core
        if self.is_linear(value):
            self.fused(conv.node, "a few rows on a CPU: a 1×1 convolution" + ", ReLU" * value.relu)
            return self.call(layers.linear, self.tensor(conv.input), self.attribute(conv.node), value.relu)
        x, *prologue = self.load(conv.input)
        forms = self.on_load(prologue)
        batch = conv.norm is not None and self.uses_batch(self.module_of(conv.norm))
        forms += "batch norm, " * batch + "norm folded in, " * (conv.norm is not None and not batch)
        forms += "sum, " * (residual is not None) + "ReLU, " * value.relu
        self.fused(conv.node, forms.removesuffix(", ") or "nothing beside it")
        if (
            conv.norm is None
            and tail == (None, False)
            and (parts := self.of_maps(x, conv.node, prologue, False))
        ):
            return parts[0]
        norm = None if conv.norm is None else self.attribute(conv.norm)
        function = layers.conv_norm if batch else layers.conv
        return self.call(function, x, self.attribute(conv.node), norm, *prologue, *tail)

    # ---- Dense blocks --------------------------------------------------------------------------------------

    def grow(self, node: fx.Node, block: Block) -> fx.Node:
        """The buffer's channels up to this concatenation's last."""
        parts = block.lists[node]
        readers = [self.module_of(user) for cat in block.lists for user in cat.users]
        batch = any(isinstance(m, nn.BatchNorm2d) and self.uses_batch(m) for m in readers)
        for part in parts[block.written :]:
            value = self.values[part]
            if batch and isinstance(value, Pending) and self.is_bare_convolution(value):
                self.made[id(value)] = self.with_statistics(value.core.node, value.core.input)
            if block.maps is not None and not batch and self.may_be_placed(part, value, block):
                block.maps = self.placed(block, value)
                continue
            x = self.tensor(value)
            if block.buffer is None:
                block.buffer = self.call(channel_buffer, x, block.width)
                self.report.fused.append(
                    Row(node.name, f"one buffer of {block.width} channels for the block")
                )
            block.maps = self.call(layers.append, block.maps, x, block.buffer)
            if batch:
                block.statistics = self.joined(block.statistics, self.statistics_of(x))
        block.written = len(parts)
        if batch:
            self.statistics[block.maps] = block.statistics
        return block.maps

    def of_maps(self, x: fx.Node, node: fx.Node, prologue: list, want_stats: bool) -> list[fx.Node] | None:
        """(y, mean, var) of a convolution that reads the maps of a block in training, and hands them on to the
        block's next append; None for any other."""
        block = next((b for b in self.blocks.values() if b.maps is x and b.statistics is not None), None)
        if block is None:
            return None
        result = self.call(layers.conv_of_maps, x, self.attribute(node), *prologue, want_stats)
        *found, block.maps = self.parts(result, 4)
        return found

    def may_be_placed(self, node: fx.Node, value: Value, block: Block) -> bool:
        """Whether a convolution, perhaps with norm and ReLU, is read by the block alone."""
        return (
            isinstance(value, Pending)
            and isinstance(value.core, Convolution)
            and not self.is_linear(value)
            and value.residual is None
            and id(value) not in self.made
            and all(self.blocks.get(user) is block for user in node.users)
        )

    def placed(self, block: Block, value: Pending) -> fx.Node:
        """The buffer's channels up to a convolution's, which are computed where they lie."""
        conv = value.core
        x, *prologue = self.load(conv.input)
        forms = self.on_load(prologue) + "norm folded in, " * (conv.norm is not None) + "ReLU, " * value.relu
        self.fused(conv.node, forms + "written into the block's buffer")
        norm = None if conv.norm is None else self.attribute(conv.norm)
        return self.call(
            layers.append_conv,
            *(block.maps, block.buffer, x, self.attribute(conv.node), norm, *prologue, value.relu),
        )

    def is_bare_convolution(self, value: Pending) -> bool:
        core = value.core
        return (
            isinstance(core, Convolution) and core.norm is None and value.open and id(value) not in self.made
        )

    def joined(self, before: tuple | None, after: tuple) -> tuple:
        if before is None:
            return after
        return tuple(self.call(torch.cat, pair) for pair in zip(before, after, strict=True))
