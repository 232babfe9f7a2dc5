"""What a call costs beside the arithmetic: each operator on a tensor of 128 numbers, ours and torch's in turns.

    python benchmarks/call_overhead.py [--seconds 0.5]

Microseconds (medians), and ours as a multiple of torch's with its quartiles: without gradients, forward with
gradients recorded, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch

from cuda_cnn import functional as F
from cuda_cnn import nn
from cuda_cnn.bench.timing import Call, interleave

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def cases(format: torch.memory_format) -> Iterator[tuple[str, Callable, Callable, list[torch.Tensor]]]:
    """(name, ours, torch's, their inputs)"""
    T = torch.nn.functional
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=format)
    ours, theirs = (m.Conv2d(8, 8, 1).to(memory_format=format) for m in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    yield "Conv2d 1x1 (module)", ours, theirs, [x]
    weight, bias, mean, var = torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)
    yield "conv2d 1x1", F.conv2d, T.conv2d, [x, ours.weight.detach(), bias]
    yield "max_pool2d", lambda t: F.max_pool2d(t, 2), lambda t: T.max_pool2d(t, 2), [x]
    for name, training in (("batch_norm, training", True), ("batch_norm, evaluation", False)):
        yield (
            name,
            lambda t, w, b, training=training: F.batch_norm(t, mean, var, w, b, training),
            lambda t, w, b, training=training: T.batch_norm(t, mean, var, w, b, training),
            [x, weight, bias],
        )
    size = 5
    yield (
        "local_response_norm",
        lambda t: F.local_response_norm(t, size),
        lambda t: T.local_response_norm(t, size),
        [x],
    )
    yield "concat", lambda a, b: F.concat((a, b), 1), lambda a, b: torch.cat((a, b), 1), [x, x.clone()]


def steps(function: Callable, inputs: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    wanted = leaves + (list(function.parameters()) if isinstance(function, torch.nn.Module) else [])
    dy = torch.ones_like(function(*inputs))

    def without_gradients() -> None:
        with torch.no_grad():
            function(*inputs)

    return {
        "no grad": without_gradients,
        "forward": lambda: function(*leaves),
        "forward + backward": lambda: torch.autograd.grad(function(*leaves), wanted, dy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    seconds = parser.parse_args().seconds
    print(f"{'':24s}{'':14s}{'':20s}{'ours µs':>9s}{'torch µs':>9s}   ours / torch (quartiles)")
    for layout, format in LAYOUTS.items():
        for name, ours, theirs, inputs in cases(format):
            torch.testing.assert_close(ours(*inputs), theirs(*inputs))
            pairs = zip(steps(ours, inputs).items(), steps(theirs, inputs).values(), strict=True)
            for (step, mine), rival in pairs:
                times = interleave({"ours": Call(mine), "torch": Call(rival)}, seconds)
                low, ratio, high = statistics.quantiles([a / b for a, b in zip(*times.values(), strict=True)])
                a, b = (1e6 * statistics.median(samples) for samples in times.values())
                print(
                    f"{name:24s}{layout:14s}{step:20s}{a:9.2f}{b:9.2f}   {ratio:.2f} ({low:.2f}-{high:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
