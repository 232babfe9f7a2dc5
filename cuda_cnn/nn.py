"""Layers on these kernels: subclasses of `torch.nn`'s, with the same constructors, parameters and state_dict."""

import torch
from torch import Tensor

from cuda_cnn import functional as F

__all__ = ["BatchNorm2d", "LocalResponseNorm"]


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on :func:`cuda_cnn.functional.batch_norm`.

    `forward(x, residual, relu=True)` adds a residual and rectifies in the same pass.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        self._check_input_dim(input)
        momentum = self.momentum or 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        # In training without tracking, statistics that a caller has put there are not touched.
        keep = self.track_running_stats or not self.training
        running_mean, running_var = (self.running_mean, self.running_var) if keep else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        return F.batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            residual=residual,
            relu=relu,
        )


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` on :func:`cuda_cnn.functional.local_response_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
