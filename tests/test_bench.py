"""The benchmarks' parts that are not time: statistics, layers, verification."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cuda_cnn import create_model
from cuda_cnn.bench import cases, table, timing
from cuda_cnn.bench.shapes import LAYERS, NETWORKS, Layer, layers

SMALL = [
    Layer(
        "x", "conv", "conv2d", (6, 9, 7), {"filters": 4, "size": 3, "stride": 2, "padding": 1, "groups": 2}
    ),
    Layer("x", "pool", "max_pool2d", (5, 9, 7), {"size": 3, "stride": 2, "padding": 1}),
    Layer("x", "norm", "local_response_norm", (7, 5, 3), {"size": 5, "alpha": 5e-4, "k": 2.0}),
    Layer("x", "bn", "batch_norm", (5, 7, 3), {}),
    Layer("x", "cat", "concat", (5, 7, 3), {"grown": 2}),
    Layer("x", "sub", "subsample", (5, 8, 6), {}),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.op)
def test_cases_are_verified_and_run(layer, backward):
    case = cases.build(layer, 3, backward)
    assert case.ours_error < 1e-5 and case.rival_error < 1e-5
    ours, theirs = case.ours(), case.rival()
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
def test_a_wrong_result_is_not_timed(monkeypatch, backward):
    right = cases.F.conv2d
    monkeypatch.setattr(cases.F, "conv2d", lambda *a: right(*a) * 1.001)
    with pytest.raises(cases.WrongResultError, match="against float64"):
        cases.build(SMALL[0], 2, backward)
    monkeypatch.setattr(cases.F, "conv2d", lambda *a: right(*a) * float("nan"))
    with pytest.raises(cases.WrongResultError):
        cases.build(SMALL[0], 2, backward)


def test_every_operator_and_network_is_in_the_demo():
    chosen = [layer for n, name, _ in table.DEMO_LAYERS for layer in layers(n) if layer.name == name]
    assert {layer.op for layer in chosen} == {layer.op for layer in LAYERS}
    assert {layer.network for layer in chosen} >= {"lenet5", "alexnet", "vgg16", "resnet50", "densenet121"}


@pytest.mark.parametrize("network", NETWORKS)
def test_listed_layers_are_those_of_the_network(network):
    """The network is run on tensors without data; each listed layer must be one of its modules' calls."""
    seen = set()

    def note(module, inputs, output):
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            out, size = module.out_channels, module.kernel_size[0]
            seen.add(("conv2d", *x.shape[1:3], out, size, module.stride[0], module.padding[0], module.groups))
        elif isinstance(module, torch.nn.MaxPool2d):
            seen.add(("max_pool2d", *x.shape[1:3], module.kernel_size, module.stride, module.padding))

    with FakeTensorMode():
        model = create_model(network)
        for module in model.modules():
            module.register_forward_hook(note)
        size = {"lenet5": (1, 32), "alexnet": (3, 227)}.get(network, (3, 224))
        model(torch.empty(2, size[0], size[1], size[1]))
    for layer in layers(network):
        a = layer.args
        if layer.op == "conv2d" and layer.name != "c3":
            wanted = ("filters", "size", "stride", "padding", "groups")
        elif layer.op == "max_pool2d":
            wanted = ("size", "stride", "padding")
        else:
            continue
        assert (layer.op, *layer.shape[:2], *(a[key] for key in wanted)) in seen, layer


def test_unknown_names_are_suggested():
    with pytest.raises(ValueError, match="unknown network 'vgg61': did you mean 'vgg16'"):
        layers("vgg61")
    with pytest.raises(ValueError, match="unknown operator 'conv3d': did you mean 'conv2d'"):
        layers(op="conv3d")


def test_quartiles_and_ratio():
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.quartiles([2.5]) == (2.5, 2.5, 2.5)
    comparison = timing.Comparison([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert comparison.ratio == (1.0, 0.75, 1.5)
    assert (comparison.ours_median, comparison.rival_median) == (2.0, 2.0)


def test_rivals_take_turns(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = []

    def rival(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    result = timing.compare(rival("a", 0.002), rival("b", 0.006), seconds=0.1)
    assert result.ratio == pytest.approx((3.0, 3.0, 3.0))
    turns = calls[6:]  # after the first calls that find how often to repeat
    assert turns == ["a", "b"] * (len(turns) // 2) and len(result.ours) == len(result.rival) == 13
