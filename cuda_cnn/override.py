"""Unmodified code on these kernels: :func:`use` for a block, :func:`enable` and :func:`disable` for the process.

While somebody uses them, overrides of aten's operators stand in PyTorch's dispatcher, at the CPU and CUDA keys, below
autograd and autocast. A call in a thread that has asked for them is served by these kernels, any other one, and any
that they cannot serve, by the kernel that was there before. After the last user they are taken out again.

A TorchDispatchMode would be simpler; but it stands in the way of every operator, and the dispatcher only of these.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_cnn import _C, _aten, backends
from cuda_cnn import functional as F

__all__ = ["OPERATORS", "Call", "CallLog", "disable", "enable", "reset", "use"]

OPERATORS = ("conv2d", "max_pool2d", "batch_norm", "concat", "local_response_norm")

# Where a thread keeps its innermost `use`. torch hands this storage on to the threads of a backward pass.
_KEY = "cuda_cnn.override"


@dataclass(frozen=True)
class Call:
    """One kind of call. `reason` is empty where these kernels served it, else it says why PyTorch's did."""

    operator: str  # one of OPERATORS
    name: str  # of the function that was called: aten's, or torch.nn.functional's
    shapes: tuple[tuple[int, ...], ...]  # of its tensors
    dtype: torch.dtype
    reason: str = ""

    @property
    def ours(self) -> bool:
        return not self.reason


class CallLog:
    """How many calls of which kind there were: `log.counts`, `log.ours`, `log.fallbacks`, `print(log)`."""

    def __init__(self, ops: frozenset[str], fallback: bool):
        self.ops, self.fallback = ops, fallback
        # Each thread counts for itself: no lock that a forked process could inherit locked.
        self._of_thread: dict[int, dict[tuple, int]] = {}

    def add(self, override: _aten.Override, args: tuple, reason: str) -> None:
        """Counts a call of what stands in for an operator."""
        tensors = args[: override.tensors] if override.tensors else args[0]
        # A list: faster than a generator.
        call = override, tuple([t.shape for t in tensors]), tensors[0].dtype, reason
        thread = threading.get_ident()
        counter = self._of_thread.get(thread)
        if counter is None:
            counter = self._of_thread.setdefault(thread, {})
        counter[call] = counter.get(call, 0) + 1

    @property
    def counts(self) -> Counter[Call]:
        total: Counter[Call] = Counter()
        for counter in tuple(self._of_thread.values()):
            for (override, shapes, dtype, reason), count in dict(counter).items():
                shapes = tuple(map(tuple, shapes))
                total[Call(override.operator, override.name, shapes, dtype, reason)] += count
        return total

    @property
    def ours(self) -> int:
        """Calls that these kernels served."""
        return sum(n for call, n in self.counts.items() if call.ours)

    @property
    def fallbacks(self) -> int:
        """Calls that PyTorch's kernels served."""
        return sum(n for call, n in self.counts.items() if not call.ours)

    def __str__(self) -> str:
        lines = [f"{self.ours} calls on these kernels, {self.fallbacks} on PyTorch's"]
        for call, count in sorted(self.counts.items(), key=lambda item: (item[0].operator, item[0].name)):
            shapes = " ".join("×".join(map(str, shape)) for shape in call.shapes)
            dtype = str(call.dtype).removeprefix("torch.")
            outcome = "ours" if call.ours else f"PyTorch: {call.reason}"
            lines.append(f"{count:6d} × {call.name:33s} {shapes:34s} {dtype:9s} {outcome}")
        return "\n".join(lines)


def use(
    ops: str | Iterable[str] = "all", exclude: str | Iterable[str] = (), fallback: bool = True
) -> contextlib.AbstractContextManager[CallLog]:
    """Runs the calls of PyTorch's operators in a block of code on these kernels.

        with cuda_cnn.use() as log:
            loss = criterion(model(x), target)
            loss.backward()
        print(log)

    Holds for the thread that enters it, and for backward passes that this thread starts inside; blocks nest, the
    innermost decides and counts; leaving it, also by an exception, restores what was before. Also a decorator.

    Args:
        ops: "all", or some of "conv2d", "max_pool2d", "batch_norm", "concat" (`torch.cat`), "local_response_norm"
            (`F.local_response_norm`, called by this name).
        exclude: operators to leave out.
        fallback: what these kernels cannot serve goes to PyTorch's own, and the log says why. False: a
            NotImplementedError instead. 1-D, 3-D and transposed convolutions are PyTorch's in either case.

    Returns:
        a context manager that gives the :class:`CallLog`.

    Raises:
        ValueError: an operator that does not exist.
    """
    return _use(CallLog(_chosen(ops, exclude), fallback))


def enable(
    ops: str | Iterable[str] = "all", exclude: str | Iterable[str] = (), fallback: bool = True
) -> CallLog:
    """:func:`use` for every thread of the process, until :func:`disable`. A block of `use` goes before it."""
    global _everywhere
    log = CallLog(_chosen(ops, exclude), fallback)
    if _everywhere is None:
        _overrides.acquire()
    _everywhere = log
    return log


def disable() -> None:
    """Ends :func:`enable`; without it, nothing happens. Blocks of :func:`use` go on."""
    global _everywhere
    if _everywhere is not None:
        _everywhere = None
        _overrides.release()


def reset() -> None:
    """All that holds for the process as it was at import: :func:`disable`, and the switches of `backends`.

    Blocks of :func:`use` go on. Converted and fused models are no state of the process: `revert`, `unfuse`.
    """
    disable()
    backends.reset()


_everywhere: CallLog | None = None


class _Pause(threading.local):
    on = False


_pause = _Pause()


def _chosen(ops: str | Iterable[str], exclude: str | Iterable[str]) -> frozenset[str]:
    chosen = (
        OPERATORS if isinstance(ops, str) and ops == "all" else (ops,) if isinstance(ops, str) else tuple(ops)
    )
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if unknown := {*chosen, *exclude} - {*OPERATORS}:
        raise ValueError(
            f'use: expected operators among {OPERATORS} or ops "all", got {sorted(map(repr, unknown))}'
        )
    return frozenset(chosen) - frozenset(exclude)


@contextlib.contextmanager
def _use(log: CallLog) -> Iterator[CallLog]:
    before = _of_this_thread()
    _overrides.acquire()
    _stash(log)
    try:
        yield log
    finally:
        _stash(before)
        _overrides.release()


def _stash(log: object) -> None:
    """torch 2.11 takes no reference of its own, yet gives one back: without this the log would die in use."""
    if _stash_takes_no_reference:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(log))
    torch._C._stash_obj_in_tls(_KEY, log)


def _takes_no_reference() -> bool:
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_KEY, probe)
    takes_none = sys.getrefcount(probe) == before
    if takes_none:  # the one that will be given back for the probe
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return takes_none


_stash_takes_no_reference = _takes_no_reference()
_stash(None)


def active() -> CallLog | None:
    """The log that a call in this thread goes to; None if nobody asked for the overrides."""
    return _of_this_thread() or _everywhere


def _of_this_thread() -> CallLog | None:
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _serve(override: _aten.Override, original: Callable, args: tuple, kwargs: dict) -> Any:
    """The call on our kernel, if this thread wants that and it can be; else on the original."""
    log = active()
    if log is None or override.operator not in log.ops or _pause.on:
        return original(*args, **kwargs)
    try:
        result = override.kernel(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (_aten.DeclinedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if override.logged:
            log.add(override, args, reason)
        if not (log.fallback or isinstance(error, _aten.NotOursError)):
            raise NotImplementedError(f"cuda_cnn.use(fallback=False): {override.name}: {reason}") from error
    else:
        if override.logged:
            log.add(override, args, "")
        return result
    # PyTorch's kernel may call others of these operators: that is its own affair.
    _pause.on = True
    try:
        return original(*args, **kwargs)
    finally:
        _pause.on = False


class _Overrides:
    """What stands in PyTorch's dispatcher, and in torch.nn.functional, while somebody uses it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.library: torch.library.Library | None = None

    def acquire(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self._install()

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.library._destroy()
                self.library = None
                torch.nn.functional.local_response_norm = _torch_local_response_norm

    def _install(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch's, that this overrides its kernels
            warnings.simplefilter("ignore")
            for override in _aten.OVERRIDES:
                for key in override.keys:
                    if "CUDA" not in key or _C.with_cuda:
                        kernel = _kernel(override, key)
                        self.library.impl(override.name, kernel, key, with_keyset=True, allow_override=True)
        torch.nn.functional.local_response_norm = _local_response_norm


_overrides = _Overrides()


@functools.cache
def _kernel(override: _aten.Override, key: str) -> Callable:
    """The override as the dispatcher calls it. The kernel that it falls back to is looked up before it goes in."""
    original = torch.library.get_kernel(f"aten::{override.name}", key).call_boxed

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        return _serve(override, functools.partial(original, keyset), args, kwargs)

    return kernel


_torch_local_response_norm = torch.nn.functional.local_response_norm
_lrn = _aten.Override("local_response_norm", "local_response_norm", F.local_response_norm)


@functools.wraps(_torch_local_response_norm)
def _local_response_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _serve(_lrn, _torch_local_response_norm, (input, *args), kwargs)
