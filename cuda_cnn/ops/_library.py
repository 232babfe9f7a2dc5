"""What every operator's binding shares.

An operator's kernel, its derivative and its autocast rule live at the dispatcher (csrc/ops, csrc/autograd). Here are its
shapes for tracers, its rule under vmap, and its public function, whose first try is `_C.eager`: the same operator for
plain arguments, without boxing. What that declines is done at length: `__torch_function__`, errors in words, odd forms.
"""

from typing import Any

import torch
from torch import Tensor


def check_tensors(operator: str, optional: tuple[str, ...] = (), **tensors: Any) -> None:
    """A TypeError for what is no Tensor; those named as optional may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise TypeError(f"{operator}: expected {name} to be a Tensor, got {type(tensor).__name__}")


def empty_like_result(tensor: Tensor, shape: Any = None) -> Tensor:
    """What a kernel allocates for a result computed from tensor: its memory format, a fresh dense tensor."""
    shape = tensor.shape if shape is None else shape
    return torch.empty(
        shape,
        dtype=tensor.dtype,
        device=tensor.device,
        memory_format=torch._prims_common.suggest_memory_format(tensor),
    )


def fold_batch(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """A vmapped tensor (B, N, …) as one batch (B·N, …); one that is not mapped is repeated."""
    if dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)
