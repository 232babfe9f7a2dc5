"""Trainings of one network on torch's layers and on these kernels, compared by how far they get from float64.

Two runs that differ by nothing but rounding do not stay near each other: an input of a ReLU or a pooling window's
second largest value crosses over in one of them, and the gradient jumps. PyTorch's own NCHW and channels_last runs are
seen to part by 1e-7 or by 1e-1. So distances are compared in many runs, not in one.
"""

import contextlib
import copy

import torch
from model_helpers import logits
from torch import nn

import cuda_cnn

FORMS = ("converted", "used", "fused")
# What no jump has touched yet: these are compared run by run.
CONTINUOUS = ("output", "running statistics")


@contextlib.contextmanager
def brought_into(form, model):
    """A form of the model, while the block lasts; nearly everything in it must have come onto our kernels."""
    if form == "converted":
        report = cuda_cnn.convert(model)
        assert report.changed and all(left.layer.startswith("timm") for left in report.left), str(report)
    elif form == "fused":
        report = cuda_cnn.fuse(model)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert len(report.fused) >= max(1, 2 * norms - 4), str(report)  # GoogLeNet's auxiliary heads are not
    with cuda_cnn.use() if form == "used" else contextlib.nullcontext() as log:
        yield
    assert log is None or (log.ours > 0 and log.fallbacks == 0), str(log)


def train(model, x, target, precision):
    """What the first of 20 steps of SGD gives, and what all of them leave behind."""
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
    for step in range(20):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
            y = logits(model(x))
        loss = nn.functional.cross_entropy(y.double(), target)
        loss.backward()
        if step == 0:
            first = {
                "output": [y.detach()],
                "gradients": [p.grad.clone() for p in model.parameters()],
                "running statistics": [b.clone() for b in model.buffers() if b.is_floating_point()],
            }
        optimiser.step()
        losses.append(loss.detach())
    return {
        **first,
        "losses": [torch.stack(losses)],
        "parameters after 20 steps": [p.detach() for p in model.parameters()],
        "running statistics after 20 steps": [b for b in model.buffers() if b.is_floating_point()],
    }


def distances(found, exact):
    """For each measure the root mean square of its tensors' relative distances; a tensor that is zero but for
    rounding (the gradient of a bias in front of a normalisation) has none."""
    result = {}
    for what, tensors in exact.items():
        sizes = [t.double().norm() for t in tensors]
        squares = [
            ((a.double() - b.double()).norm() / size).square()
            for a, b, size in zip(found[what], tensors, sizes, strict=True)
            if size > 1e-9 * max(sizes)
        ]
        result[what] = torch.stack(squares).mean().sqrt().item()
    return result


def ratios(runs, precision):
    """{(form, measure): [how many times further from float64 than PyTorch's worse layout, …]}, a value a run.

    runs: (network on torch's layers, images, classes)."""
    result = {}
    for original, x, target in runs:
        exact = train(copy.deepcopy(original).double(), x.double(), target, "float64")
        torchs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            model = copy.deepcopy(original).to(memory_format=layout)
            found = train(model, x.contiguous(memory_format=layout), target, precision)
            torchs.append(distances(found, exact))
        for form in FORMS:
            model = copy.deepcopy(original)
            with brought_into(form, model):
                found = distances(train(model, x, target, precision), exact)
            assert precision != "float32" or found["losses"] < 1e-2, f"{form}: {found['losses']:.2e}"
            for what, distance in found.items():
                result.setdefault((form, what), []).append(distance / max(run[what] for run in torchs))
    return result


def assert_trains_like_torch(runs, precision):
    """What is continuous in its inputs: in every run within twice torch's distance. What jumps: in more than a third
    of the runs; kernels that lose more than torch's would be further away in all of them."""
    for (form, what), values in ratios(runs, precision).items():
        values.sort()
        bounded = values[-1] if what in CONTINUOUS else values[len(values) // 3]
        text = " ".join(f"{v:.2f}" for v in values)
        assert bounded <= 2, f"{form}, {what}: distance from float64 as a multiple of torch's: {text}"
