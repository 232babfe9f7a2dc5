"""Each operator in its plainest form: the formula, in loops over what is small, in tensor arithmetic otherwise.

For tests and benchmarks. Everything is differentiable by autograd, and as exact as the dtype that it is given.
"""

import torch
from torch import Tensor

__all__ = ["local_response_norm"]


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """y_c = x_c · (k + α/n · Σ_j x_j²)^−β over the channels j from c − ⌊n/2⌋ to c + ⌊(n−1)/2⌋."""
    channels = []
    for c in range(x.shape[1]):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        scale = k + alpha / size * window.square().sum(dim=1)
        channels.append(x[:, c] * scale.pow(-beta))
    return torch.stack(channels, dim=1)
