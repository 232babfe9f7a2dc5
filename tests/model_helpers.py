"""What the networks' tests share: the papers' parameter counts, and two networks compared."""

import copy

import torch
from torch import Tensor, nn

import cuda_cnn.nn
from cuda_cnn import create_model

# The papers', torchvision's published ones, and for the rest the sum over the paper's table.
PARAMETERS = {
    "alexnet": 60_965_224,
    "alexnet_torchvision": 61_100_840,
    "alexnet_cifar": 85_098,
    "vgg11": 132_863_336,
    "vgg11_lrn": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16c": 133_638_952,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16c_bn": 133_647_400,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain110": 1_727_962,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "densenet40_12": 1_019_722,
    "densenet_bc100_12": 769_162,
    "googlenet": 13_378_280,
    "googlenet_torchvision": 13_004_888,
}
TORCHVISION = {name: name for name in PARAMETERS if name.startswith(("vgg", "resnet", "densenet"))}
for absent in ("vgg11_lrn", "vgg16c", "vgg16c_bn", "densenet264", "densenet40_12", "densenet_bc100_12"):
    del TORCHVISION[absent]
for cifar in (20, 32, 44, 56, 110, 1202):
    del TORCHVISION[f"resnet{cifar}"]
TORCHVISION |= {"alexnet_torchvision": "alexnet", "googlenet_torchvision": "googlenet"}

SMALL_DENSENET = {"growth_rate": 4, "blocks": (2, 3), "init_planes": 8}


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def reals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    size = expected.abs().max().item()
    assert error <= relative * size, f"{what}: error {error:.2e} beside values of {size:.2e}"


def shorten_classifier(model: nn.Module) -> nn.Module:
    """One linear layer for AlexNet's and VGG's three: 4096 hidden units take long and tell no more."""
    first, *_, last = (m for m in model.classifier if isinstance(m, nn.Linear))
    model.classifier = nn.Linear(first.in_features, last.out_features, device=first.weight.device)
    return model


def logits(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat(tuple(output), 1)


def assert_same_network(ours: nn.Module, theirs: nn.Module, x: Tensor, relative: float) -> None:
    """Same outputs, gradients and running statistics, in training (without dropout) and in evaluation."""
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for training in (True, False):
        results = []
        for model in (ours.train(training), theirs.train(training)):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            y = logits(model(leaf))
            y.backward(reals(*y.shape, seed=1, dtype=y.dtype))
            used = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            results.append(
                {"output": y.detach(), "input gradient": leaf.grad, **used, **dict(model.named_buffers())}
            )
        assert results[0].keys() == results[1].keys()
        size = max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
        for what, expected in results[1].items():
            if expected.is_floating_point() and expected.abs().max() > 1e-9 * size:
                assert_near(results[0][what], expected, relative, what)


def on_torch_layers(model: nn.Module) -> nn.Module:
    """A copy whose layers are torch.nn's own."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module).__module__ == cuda_cnn.nn.__name__ and type(module) is not cuda_cnn.nn.Concat:
            module.__class__ = type(module).__mro__[1]
    return twin
