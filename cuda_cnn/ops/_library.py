"""What every operator's binding shares.

An operator's kernel, its derivative and its autocast rule live at the dispatcher (csrc/ops, csrc/autograd). Here are
its shapes for tracers, its rule under vmap, and its public function, whose first try is `_C.eager`: the same operator
for plain arguments, without boxing. What that declines is done at length: `__torch_function__`, odd forms, errors.

A derivative that is put together from operators may be a Python `autograd.Function` instead (`needs_function`, `apply`,
and the same static methods through `register_autograd` for traced code).
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

# The operators.
ops: Any = torch.ops.cuda_cnn


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the autograd.Function: somebody differentiates or transforms it.

    Traced code calls the operator itself, whose registered autograd the tracer knows.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def below_autograd(operator: Any, *args: Any) -> Any:
    """operator(*args) where needs_function has said no: past the operator's derivative, whose rule is Python."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def check_tensors(operator: str, optional: tuple[str, ...] = (), **tensors: Any) -> None:
    """A TypeError for what is no Tensor; those named as optional may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise TypeError(f"{operator}: expected {name} to be a Tensor, got {type(tensor).__name__}")


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args) for positional arguments; outside functorch without a look at forward's signature,
    which would take longer than a small kernel."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on this tensor's device, or None outside autocast."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The tensor as autocast would hand it on: float32, bfloat16 and float16 change to dtype, others stay."""
    if tensor is None or dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


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


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Gives traced, exported and direct callers of the operator the Function's own derivative."""
    torch.library.register_autograd(
        f"cuda_cnn::{name}", function.backward, setup_context=function.setup_context
    )
