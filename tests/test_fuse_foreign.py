"""cuda_cnn.fuse on the networks of torchvision and timm, where they are installed."""

import copy

import pytest
import torch
from torch import nn

import cuda_cnn

NETWORKS = {
    "torchvision": ["resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet"],
    "timm": ["resnet50", "densenet121"],
}


def build(library, name):
    torch.manual_seed(0)
    if library == "timm":
        return pytest.importorskip("timm").create_model(name)
    return getattr(pytest.importorskip("torchvision").models, name)()


def total(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else sum(outputs)


@pytest.mark.parametrize("library,name", [(lib, name) for lib, names in NETWORKS.items() for name in names])
def test_same_numbers(library, name):
    plain = build(library, name).double()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = copy.deepcopy(plain)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        report = cuda_cnn.fuse(fused)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        assert len(report.fused) >= 2 * norms - 4  # all of them, with their convolutions, but auxiliary heads
        y, z = total(plain(x)), total(fused(x))
        torch.testing.assert_close(z, y)
        if not training:
            continue
        y.square().mean().backward()
        z.square().mean().backward()
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7 * max(1, p.grad.abs().max()))
    for p, q in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p)
