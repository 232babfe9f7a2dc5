"""Layers on these kernels: subclasses of `torch.nn`'s, with the same constructors, parameters and state_dict."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from cuda_cnn import functional as F
from cuda_cnn.models.rbf import EuclideanRBF
from cuda_cnn.ops.subsample import AMPLITUDE, SLOPE
from cuda_cnn.ops.sync_batch_norm import sync_batch_norm

__all__ = [
    "BatchNorm2d",
    "Concat",
    "Conv2d",
    "EuclideanRBF",
    "LocalResponseNorm",
    "MaxPool2d",
    "Subsample2d",
    "SyncBatchNorm",
    "TorchConcat",
    "TorchSubsample2d",
]


def _is_node(layer: torch.nn.Module, input: Tensor) -> bool:
    """Whether torch.fx is tracing a network that this layer is part of: it is to become one node of the graph, as a
    layer of torch.nn does. fx itself takes those for leaves whose class is defined in torch.nn."""
    return isinstance(input, torch.fx.Proxy) and input.tracer.root is not layer


def _node(layer: torch.nn.Module, input: torch.fx.Proxy, **kwargs: object) -> torch.fx.Proxy:
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), kwargs)


def _count_batch(
    norm: torch.nn.modules.batchnorm._BatchNorm,
) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """Counts a batch, as torch's layer does, and gives (running_mean, running_var, training, momentum) for it."""
    momentum = norm.momentum or 0.0
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches so far
            momentum = 1.0 / float(norm.num_batches_tracked)
    # In training without tracking, statistics that a caller has put there are not touched.
    keep = norm.track_running_stats or not norm.training
    running_mean, running_var = (norm.running_mean, norm.running_var) if keep else (None, None)
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    return running_mean, running_var, training, momentum


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on :func:`cuda_cnn.functional.batch_norm`.

    `forward(x, residual, relu=True)` adds a residual and rectifies in the same pass.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        if _is_node(self, input):
            fused = {"residual": residual, "relu": relu} if relu or residual is not None else {}
            return _node(self, input, **fused)
        self._check_input_dim(input)
        running_mean, running_var, training, momentum = _count_batch(self)
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


class Concat(torch.nn.Module):
    """Joins a list or tuple of tensors along `dim` with :func:`cuda_cnn.functional.concat`."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return F.concat(tensors, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on :func:`cuda_cnn.functional.conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_node(self, input):
            return _node(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` on :func:`cuda_cnn.functional.local_response_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_node(self, input):
            return _node(self, input)
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on :func:`cuda_cnn.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if _is_node(self, input):
            return _node(self, input)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool2d(input, *window, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, on a CPU too: in training under torch.distributed the statistics are those of the
    images of all processes of the group; else it is batch normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_node(self, input):
            return _node(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, training, momentum = _count_batch(self)
        group = self.process_group
        if self.training and distributed.is_available() and distributed.is_initialized():
            group = group or distributed.group.WORLD
            if distributed.get_world_size(group) > 1:
                parameters = self.weight, self.bias, momentum, self.eps
                return sync_batch_norm(input, running_mean, running_var, *parameters, group)
        parameters = self.weight, self.bias, training, momentum, self.eps
        return F.batch_norm(input, running_mean, running_var, *parameters)


class TorchConcat(Concat):
    """:class:`Concat` in torch's functions, which `cuda_cnn.revert` makes of it."""

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(tensors), self.dim)


class Subsample2d(torch.nn.Module):
    """LeNet-5's S layers: :func:`cuda_cnn.functional.subsample` with a coefficient and a bias for each map.

    Both start uniform in ±2.4 / (cells of a window), as the paper's appendix A has it.
    """

    def __init__(self, channels: int, kernel_size: int | tuple[int, int] = 2, squash: str = "tanh") -> None:
        super().__init__()
        self.kernel_size, self.squash = kernel_size, squash
        self.coefficient = torch.nn.Parameter(torch.empty(channels))
        self.bias = torch.nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        kernel_h, kernel_w = (
            (self.kernel_size,) * 2 if isinstance(self.kernel_size, int) else self.kernel_size
        )
        for parameter in (self.coefficient, self.bias):
            torch.nn.init.uniform_(parameter, -2.4 / (kernel_h * kernel_w), 2.4 / (kernel_h * kernel_w))

    def forward(self, input: Tensor) -> Tensor:
        return F.subsample(input, self.coefficient, self.bias, self.kernel_size, self.squash)

    def extra_repr(self) -> str:
        return f"{len(self.coefficient)}, kernel_size={self.kernel_size}, squash={self.squash!r}"


class TorchSubsample2d(Subsample2d):
    """:class:`Subsample2d` in torch's functions, which `cuda_cnn.revert` makes of it."""

    def forward(self, input: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(input, self.kernel_size, divisor_override=1)
        a = self.coefficient[:, None, None] * cells + self.bias[:, None, None]
        if self.squash == "tanh":
            return AMPLITUDE * torch.tanh(SLOPE * a)
        return torch.sigmoid(a) if self.squash == "sigmoid" else a
