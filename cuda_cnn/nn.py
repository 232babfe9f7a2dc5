"""Layers on these kernels: subclasses of `torch.nn`'s, with the same constructors, parameters and state_dict."""

import torch
from torch import Tensor

from cuda_cnn import functional as F

__all__ = ["LocalResponseNorm"]


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` on :func:`cuda_cnn.functional.local_response_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
