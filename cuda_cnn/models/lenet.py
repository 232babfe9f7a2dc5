"""LeNet-5, as its paper defines it, and as it is usually taught today.

LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 1998, §II.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from .. import functional as F
from .. import nn as cnn
from ..convert import register_torch_form
from .rbf import CHARACTERS, EuclideanRBF
from .registry import register_model

__all__ = ["C3_TABLE", "EuclideanLoss", "LeNet5", "LeNet5Modern", "MAPLoss", "SquashingTanh", "TableConv2d"]

# Table I of the paper: the maps of S2 that each of the 16 maps of C3 reads.
C3_TABLE = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)),
)


class TableConv2d(nn.Module):
    """Convolution whose output map o reads only the input maps `table[o]`.

    One 2-D filter for each connected pair of maps is kept, and nothing else; one dense convolution, whose
    other weights are zero, computes all maps. Shape: (N, in_channels, H, W) → (N, len(table), H−k+1, W−k+1).
    """

    def __init__(self, in_channels: int, table: tuple[tuple[int, ...], ...], kernel_size: int):
        super().__init__()
        pairs = [(o, i) for o, inputs in enumerate(table) for i in inputs]
        self.table, self.in_channels, self.kernel_size = table, in_channels, kernel_size
        self.weight = nn.Parameter(torch.empty(len(pairs), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(table)))
        out_map, in_map = torch.tensor(pairs).unbind(1)
        self.register_buffer("out_map", out_map, persistent=False)
        self.register_buffer("in_map", in_map, persistent=False)

    def dense_weight(self) -> Tensor:
        """(len(table), in_channels, k, k), zero where two maps are not connected."""
        dense = self.weight.new_zeros(len(self.table), self.in_channels, self.kernel_size, self.kernel_size)
        return dense.index_put((self.out_map, self.in_map), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {len(self.table)}, kernel_size={self.kernel_size}, pairs={len(self.weight)}"
        )


class TorchTableConv2d(TableConv2d):
    """The same on torch's convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.dense_weight(), self.bias)


register_torch_form(TorchTableConv2d, TableConv2d, "conv2d")


class SquashingTanh(nn.Module):
    """1.7159·tanh(2a/3), appendix A."""

    def forward(self, a: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(a * (2 / 3))


class LeNet5(nn.Module):
    """LeNet-5 with exactly 60,000 trainable parameters (for one input channel).

    Input (N, in_chans, H, W), at least 32×32, background −0.1 and ink 1.175. Output: the penalty of each
    class (smaller is better), (N, K); of larger inputs a map of them, (N, K, (H−32)/4+1, (W−32)/4+1).
    """

    penalties = True
    input_size = 32
    head_names = ("f6", "rbf")

    def __init__(self, classes: str = "0123456789", in_chans: int = 1, squash: str = "tanh"):
        super().__init__()
        if squash not in ("tanh", "sigmoid"):
            raise ValueError(f"lenet5: expected squash 'tanh' or 'sigmoid', got {squash!r}")
        self.c1 = cnn.Conv2d(in_chans, 6, 5)
        self.s2 = cnn.Subsample2d(6, squash=squash)
        self.c3 = TableConv2d(6, C3_TABLE, 5)
        self.s4 = cnn.Subsample2d(16, squash=squash)
        self.c5 = cnn.Conv2d(16, 120, 5)
        self.f6 = cnn.Conv2d(120, 84, 1)
        self.rbf = EuclideanRBF(classes)
        self.squash = SquashingTanh() if squash == "tanh" else nn.Sigmoid()
        # F6 draws in −1 … +1, which a sigmoid cannot reach.
        self.squash_f6 = SquashingTanh()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±2.4 / fan-in, where the fan-in is the number of inputs of one unit."""
        fan_in = {self.c1: self.c1.in_channels * 25, self.s2: 4, self.s4: 4, self.c5: 400, self.f6: 120}
        for layer, inputs in fan_in.items():
            for p in layer.parameters():
                p.uniform_(-2.4 / inputs, 2.4 / inputs)
        inputs = torch.tensor([25.0 * len(maps) for maps in C3_TABLE])
        self.c3.weight.uniform_(-2.4, 2.4).div_(inputs[self.c3.out_map][:, None, None])
        self.c3.bias.uniform_(-2.4, 2.4).div_(inputs)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """S2, S4 and C5."""
        _check_size("lenet5", x)
        s2 = self.s2(self.squash(self.c1(x)))
        s4 = self.s4(self.squash(self.c3(s2)))
        return [s2, s4, self.squash(self.c5(s4))]

    def forward_f6(self, x: Tensor) -> Tensor:
        """What the network draws: (N, 84, H', W'), each 84 a picture of 12 rows of 7."""
        return self.squash_f6(self.f6(self.forward_features(x)[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return _single(self.rbf(self.forward_f6(x)))


class LeNet5Modern(nn.Module):
    """LeNet-5's layer sizes with ReLU, max-pooling and softmax scores (larger is better)."""

    penalties = False
    input_size = 32
    head_names = ("f6", "output")

    def __init__(self, num_classes: int = 10, in_chans: int = 1):
        super().__init__()
        self.c1 = cnn.Conv2d(in_chans, 6, 5)
        self.c3 = cnn.Conv2d(6, 16, 5)
        self.c5 = cnn.Conv2d(16, 120, 5)
        self.f6 = cnn.Conv2d(120, 84, 1)
        self.output = cnn.Conv2d(84, num_classes, 1)
        self.pool = cnn.MaxPool2d(2)
        self.relu = nn.ReLU()
        for layer in (self.c1, self.c3, self.c5, self.f6, self.output):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """S2, S4 and C5."""
        _check_size("lenet5_modern", x)
        s2 = self.pool(self.relu(self.c1(x)))
        s4 = self.pool(self.relu(self.c3(s2)))
        return [s2, s4, self.relu(self.c5(s4))]

    def forward(self, x: Tensor) -> Tensor:
        return _single(self.output(self.relu(self.f6(self.forward_features(x)[-1]))))


class EuclideanLoss(nn.Module):
    """Equation 8: the mean penalty of the right class, mean(y_D). penalties (N, K, …), target (N, …)."""

    def forward(self, penalties: Tensor, target: Tensor) -> Tensor:
        return penalties.gather(1, target.unsqueeze(1)).mean()


class MAPLoss(nn.Module):
    r"""Equation 9: the right class's penalty is pulled down, those of the wrong classes are pushed up.

    .. math:: \operatorname{mean}\Big( y_D + \log\big( e^{-j} + \sum_i e^{-y_i} \big) \Big), \quad j > 0

    `j` caps the push: a class whose penalty is well above j is left alone.
    penalties (N, K, …), target (N, …) of class indices.
    """

    def __init__(self, j: float = 1.0):
        super().__init__()
        if not (j > 0 and math.isfinite(j)):
            raise ValueError(f"MAPLoss: expected j > 0, got {j}")
        self.j = j

    def forward(self, penalties: Tensor, target: Tensor) -> Tensor:
        garbage = torch.full_like(penalties[:, :1], self.j)
        competition = torch.cat((garbage, penalties), 1).neg().logsumexp(1)
        return (penalties.gather(1, target.unsqueeze(1)).squeeze(1) + competition).mean()

    def extra_repr(self) -> str:
        return f"j={self.j}"


@register_model
def lenet5(num_classes: int | None = None, in_chans: int = 1, classes: str | None = None, **kwargs) -> LeNet5:
    """The paper's LeNet-5. `classes="ABC"` names the characters it draws; `num_classes` alone takes the first
    of digits, capitals, small letters, the rest. `squash` is "tanh" (the paper's) or "sigmoid"."""
    if classes is None:
        count = 10 if num_classes is None else num_classes
        if not 1 <= count <= len(CHARACTERS):
            raise ValueError(f"lenet5: expected num_classes from 1 to {len(CHARACTERS)}, got {count}")
        classes = CHARACTERS[:count]
    elif num_classes not in (None, len(classes)):
        raise ValueError(
            f"lenet5: num_classes={num_classes} does not fit the {len(classes)} characters of classes"
        )
    return LeNet5(classes, in_chans, **kwargs)


@register_model
def lenet5_modern(num_classes: int = 10, in_chans: int = 1) -> LeNet5Modern:
    """LeNet-5's shape with ReLU, max-pooling and cross-entropy."""
    return LeNet5Modern(num_classes, in_chans)


def _check_size(name: str, x: Tensor) -> None:
    if x.dim() != 4 or x.size(2) < 32 or x.size(3) < 32:
        raise RuntimeError(
            f"{name}: expected input (N, C, H, W) of at least 32×32, got shape {list(x.shape)}"
        )


def _single(scores: Tensor) -> Tensor:
    return scores.flatten(1) if scores.shape[2:] == (1, 1) else scores


# They branch on shapes: a call each in what torch.fx traces.
fx.wrap("_check_size")
fx.wrap("_single")
