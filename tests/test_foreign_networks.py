"""torchvision's and timm's networks converted, under `use` and fused, beside their originals: outputs, gradients,
running statistics, and 20 steps of training in float32 and in bfloat16 autocast."""

import copy

import pytest
import torch
from model_helpers import logits, shorten_classifier
from torch import nn
from training_helpers import FORMS, assert_trains_like_torch, brought_into

import cuda_cnn

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# 64×64 images, as they come.
NETWORKS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision vgg11_bn": lambda: shorten_classifier(torchvision.models.vgg11_bn(num_classes=4)),
    "torchvision densenet121": lambda: torchvision.models.densenet121(num_classes=4),
    "torchvision googlenet": lambda: torchvision.models.googlenet(num_classes=4, init_weights=False),
    "torchvision alexnet": lambda: shorten_classifier(torchvision.models.alexnet(num_classes=4)),
    "timm resnet50": lambda: timm.create_model("resnet50", num_classes=4),
    "timm densenet121": lambda: timm.create_model("densenet121", num_classes=4),
}


def without(model, layers, features):
    """The network's own code with some layers left out: what is trained here has to be small."""
    for name in layers:
        setattr(model, name, nn.Identity())
    model.fc = nn.Linear(features, 4)
    return model


RESNET, GOOGLENET = ["layer3", "layer4"], [f"inception{i}" for i in ("4b", "4c", "4d", "4e", "5a", "5b")]
SMALL = {
    "torchvision resnet18": lambda: without(torchvision.models.resnet18(), RESNET, 128),
    "torchvision vgg": lambda: nn.Sequential(
        torchvision.models.vgg.make_layers([16, "M", 32, "M", 48, 48, "M"], batch_norm=True),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 4)),
    ),
    "torchvision densenet": lambda: torchvision.models.DenseNet(8, (3, 4, 3), 16, num_classes=4),
    "torchvision googlenet": lambda: without(
        torchvision.models.googlenet(aux_logits=False, init_weights=False), GOOGLENET, 512
    ),
    "timm resnet50": lambda: without(timm.create_model("resnet50", layers=(2, 2, 1, 1)), RESNET, 512),
    "timm densenet": lambda: timm.models.densenet.DenseNet(8, (3, 4, 3), 4),
}


def build(make, seed=0):
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_in_float64(name):
    """Everything is right: what is left is rounding, which float64 makes small."""
    original = build(NETWORKS[name]).double()
    results = []
    for form in ("original", *FORMS):
        model = copy.deepcopy(original)
        found = []
        with brought_into(form, model):
            y = logits(model(batch()))
            y.square().mean().backward()
            found += [y.detach(), *(p.grad for p in model.parameters())]
        if form == "fused":  # the graph for inference is another one
            cuda_cnn.fuse(model.eval())
        with torch.no_grad(), brought_into("used" if form == "used" else "original", model.eval()):
            found.append(logits(model(batch())))
        results.append([*found, *model.buffers()])
    for form, found in zip(FORMS, results[1:], strict=True):
        for a, b in zip(found, results[0], strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, f=form: f"{f}: {m}")


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_training(precision):
    runs = []
    for seed in range(2):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        runs += [(build(make, seed), x, torch.arange(4)) for make in SMALL.values()]
    assert_trains_like_torch(runs, precision)
