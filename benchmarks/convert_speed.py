"""Networks before and after `cuda_cnn.convert`: seconds of inference and of a training step, in turns.

python benchmarks/convert_speed.py alexnet_torchvision resnet18 --batch 4 --size 224 --rounds 5
"""

import argparse
import copy
import statistics
import time

import torch

import cuda_cnn


def seconds(model: torch.nn.Module, x: torch.Tensor, training: bool) -> float:
    start = time.perf_counter()
    if training:
        model(x).square().mean().backward()
    else:
        with torch.inference_mode():
            model(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}, channels_last, float32"
    )
    print(
        "| network | | PyTorch, ms | converted, ms | PyTorch / converted (quartiles) |\n|---|---|---|---|---|"
    )
    for name in args.models:
        after = cuda_cnn.create_model(name).to(memory_format=torch.channels_last)
        before = copy.deepcopy(after)
        cuda_cnn.revert(before)
        x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
        for training in (False, True):
            before.train(training), after.train(training)
            if not training:
                with torch.inference_mode():
                    torch.testing.assert_close(after(x), before(x), rtol=1e-3, atol=1e-3)
            times = [
                (seconds(before, x, training), seconds(after, x, training)) for _ in range(args.rounds + 1)
            ][1:]
            ratios = [a / b for a, b in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            medians = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
            row = "training step" if training else "inference"
            print(
                f"| {name} | {row} | {' | '.join(f'{m:.1f}' for m in medians)} | {middle:.2f} ({low:.2f}–{high:.2f}) |"
            )


if __name__ == "__main__":
    main()
