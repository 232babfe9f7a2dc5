"""Whole networks: eager PyTorch in channels_last against the same network fused. Time of a call and of a training
step, and the bytes that a step keeps for its backward pass.

    python benchmarks/fused_networks.py resnet50 --batch 8 [--passes inference training memory] [--side 224]

Both sides hold the same weights, run in this process in turn (A B A B …), and outputs and gradients are compared
before a time counts. Times are medians over the rounds, with the quartiles of the ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cuda_cnn


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Distinct storages that a forward pass keeps for its backward pass, parameters and x apart."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = first(model(x))
    for tensor in (*model.parameters(), x):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(kept.values())


def first(outputs: Tensor | tuple) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def training_step(model: nn.Module, x: Tensor) -> Tensor:
    y = first(model(x))
    model.zero_grad()
    y.square().mean().backward()
    return y


def inference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return first(model(x))


def check(call: Callable, plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    a, b = call(plain, x), call(fused, x)
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * a.abs().max().item())
    pairs = zip(plain.parameters(), fused.parameters(), strict=True)
    large = max((p.grad.norm() for p in plain.parameters() if p.grad is not None), default=0)
    for p, q in pairs:
        if p.grad is not None and p.grad.norm() > 1e-3 * large:
            assert (p.grad - q.grad).norm() < 0.1 * p.grad.norm()  # ReLU masks flip at rounding's edge


def compare(call: Callable, plain: nn.Module, fused: nn.Module, x: Tensor, seconds: float) -> str:
    check(call, plain, fused, x)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for model, taken in zip((plain, fused), times, strict=True):
            start = time.perf_counter()
            call(model, x)
            taken.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
    ours, theirs = (statistics.median(t) * 1e3 for t in (times[1], times[0]))
    ratio = f"{middle:.2f}× ({low:.2f} … {high:.2f}), {len(times[0])} rounds"
    return f"{theirs:8.1f} ms eager {ours:8.1f} ms fused   {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--passes", nargs="+", default=["inference", "training", "memory"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    fused = cuda_cnn.create_model(args.model)
    for module in fused.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    cuda_cnn.revert(plain)
    fused = fused.to(memory_format=torch.channels_last)
    cuda_cnn.fuse(fused)
    x = torch.randn(args.batch, 3, args.side, args.side).contiguous(memory_format=torch.channels_last)
    size = f"{args.batch}×3×{args.side}×{args.side}"
    print(f"{args.model}, {size}, float32, {args.threads} threads, torch {torch.__version__}")
    if "inference" in args.passes:
        print("inference", compare(inference, plain.eval(), fused.eval(), x, args.seconds))
    if "training" in args.passes:
        print("training ", compare(training_step, plain.train(), fused.train(), x, args.seconds))
    if "memory" in args.passes:  # last: it moves the running statistics of one side twice
        bytes_fused = kept_bytes(fused, x)
        for layout in (torch.contiguous_format, torch.channels_last):
            bytes_plain = kept_bytes(plain.to(memory_format=layout), x.contiguous(memory_format=layout))
            print(
                f"kept: {bytes_fused / 2**20:.1f} MiB fused (channels_last), {bytes_plain / 2**20:.1f} MiB eager "
                f"({str(layout).removeprefix('torch.')}): {bytes_fused / bytes_plain:.1%}"
            )


if __name__ == "__main__":
    main()
