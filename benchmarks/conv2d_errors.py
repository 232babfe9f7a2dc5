"""The largest error of each conv2d algorithm on the CPU against float64, as the Markdown table of docs/numerics.md.

python benchmarks/conv2d_errors.py [float32|bfloat16]
"""

import sys

import torch

from cuda_cnn import backends
from cuda_cnn.ops.conv2d import algorithm

# name, x, weight, stride, padding, groups: one image of layers with short and with long sums
LAYERS = [
    ("VGG 64@112", (1, 64, 112, 112), (64, 64, 3, 3), 1, 1, 1),
    ("VGG 256@28", (1, 256, 28, 28), (512, 256, 3, 3), 1, 1, 1),
    ("ResNet 512@7", (4, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1),
    ("ResNet 1×1, 1024@14", (4, 1024, 14, 14), (256, 1024, 1, 1), 1, 0, 1),
    ("ResNet 3×3/2, 128@56", (2, 128, 56, 56), (128, 128, 3, 3), 2, 1, 1),
    ("ResNet 7×7/2, stem", (2, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    ("AlexNet conv1", (2, 3, 227, 227), (96, 3, 11, 11), 4, 0, 1),
    ("AlexNet conv2", (2, 48, 27, 27), (128, 48, 5, 5), 1, 2, 1),
    ("GoogLeNet 5×5, 16@28", (4, 16, 28, 28), (32, 16, 5, 5), 1, 2, 1),
    ("depthwise 128@56", (2, 128, 56, 56), (128, 1, 3, 3), 1, 1, 128),
    ("32 groups of 4 @56", (2, 128, 56, 56), (128, 4, 3, 3), 1, 1, 32),
]
PASSES = ("forward", "input_grad", "weight_grad")
LADDER = ("winograd", "depthwise", "gemm", "reference")


def errors(layer, dtype):
    """(algorithm or "torch", pass): the largest difference from float64 over the largest value."""
    _, x_shape, weight_shape, stride, padding, groups = layer
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x, weight = normal(x_shape), normal(weight_shape)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    dy = normal(torch.nn.functional.conv2d(x.to("meta"), weight.to("meta"), None, *geometry).shape)

    def torchs(dy, x, weight):
        y = torch.nn.functional.conv2d(x, weight, None, *geometry)
        masked = torch.ops.aten.convolution_backward(
            dy, x, weight, None, *geometry[:3], False, (0, 0), groups, (True, True, False)
        )
        return y, masked[0], masked[1]

    def ours(dy, x, weight):
        ops = torch.ops.cuda_cnn
        return (
            ops.conv2d(x, weight, None, *geometry),
            ops.conv2d_input_grad(dy, weight, x.shape, *geometry, True),
            ops.conv2d_weight_grad(dy, x, weight.shape, *geometry, True),
        )

    exact = torchs(dy.double(), x.double(), weight.double())
    found = {"torch": torchs(dy, x, weight)}
    applies = {("torch", which) for which in PASSES}
    for name in LADDER:
        with backends.flags(conv2d_algorithm=name):
            calls = {
                which: algorithm(which, x_shape, weight_shape, *geometry, dtype=dtype) for which in PASSES
            }
            if name in calls.values():
                found[name] = ours(dy, x, weight)
        applies |= {(name, which) for which in PASSES if calls[which] == name}
    return {
        (name, which): ((value.double() - right).abs().max() / right.abs().max()).item()
        for name, values in found.items()
        for which, value, right in zip(PASSES, values, exact)
        if (name, which) in applies
    }


def main():
    dtype = getattr(torch, sys.argv[1]) if len(sys.argv) > 1 else torch.float32
    print("| layer | pass | torch | " + " | ".join(LADDER) + " |")
    print("|---|---|" + "---|" * (1 + len(LADDER)))
    for layer in LAYERS:
        found = errors(layer, dtype)
        for which in PASSES:
            cells = [found.get((name, which)) for name in ("torch", *LADDER)]
            text = " | ".join("" if cell is None else f"{cell:.1e}" for cell in cells)
            print(f"| {layer[0]} | {which.replace('_', ' ')} | {text} |")


if __name__ == "__main__":
    main()
