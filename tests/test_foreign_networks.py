"""torchvision's and timm's networks, converted and under `use`, beside their originals: outputs, gradients, running
statistics."""

import copy

import pytest
import torch

import cuda_cnn

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NETWORKS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=4, dropout=0.0),
    "torchvision densenet121": lambda: torchvision.models.densenet121(num_classes=4),
    "torchvision alexnet": lambda: torchvision.models.alexnet(num_classes=4, dropout=0.0),
    "timm resnet50": lambda: timm.create_model("resnet50", num_classes=4),
    "timm densenet121": lambda: timm.create_model("densenet121", num_classes=4),
}


def networks(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = NETWORKS[name]().to(dtype)
    converted = copy.deepcopy(model)
    report = cuda_cnn.convert(converted)
    assert report.changed and all(left.layer.startswith("timm") for left in report.left), str(report)
    return model, converted


def batch(dtype=torch.float32, n=4, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(model, x):
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_in_float64(name):
    """Everything is right: what is left is rounding, which float64 makes small."""
    model, converted = networks(name, torch.float64)
    used, x = copy.deepcopy(model), batch(torch.float64)
    expected, ours = step(model, x), step(converted, x)
    with cuda_cnn.use() as log:
        through_use = step(used, x)
    assert log.ours > 0 and log.fallbacks == 0
    for results in (ours, through_use):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
