"""What `cuda_cnn.use` costs, against a TorchDispatchMode that would do the same: microseconds a call, in turns.

python benchmarks/override_cost.py
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_cnn


class Mode(TorchDispatchMode):
    """The rival: convolution on our kernel, everything else as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding, dilation, _, _, groups = args
            return torch.ops.cuda_cnn.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return func(*args, **(kwargs or {}))


def microseconds(call: Callable[[], object], count: int = 300) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - start) / count


def main() -> None:
    torch.set_num_threads(1)
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1)
    layer = cuda_cnn.nn.Conv2d(8, 8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    calls = {"F.conv2d, 1×1": lambda: F.conv2d(x, weight), "F.relu": lambda: F.relu(x)}
    contexts = {"PyTorch": torch.no_grad, "use": cuda_cnn.use, "TorchDispatchMode": Mode}
    times: dict[tuple[str, str], list[float]] = {}
    torch.testing.assert_close(layer(x), F.conv2d(x, weight))
    with torch.no_grad():
        for _ in range(21):
            for context, enter in contexts.items():
                with enter():
                    for name, call in calls.items():
                        times.setdefault((name, context), []).append(microseconds(call))
            times.setdefault(("F.conv2d, 1×1", "converted layer"), []).append(microseconds(lambda: layer(x)))
    print("| call | by | median | quartiles |\n|---|---|---|---|")
    for (name, context), values in sorted(times.items()):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {context} | {middle:.1f} | {low:.1f}–{high:.1f} |")


if __name__ == "__main__":
    main()
