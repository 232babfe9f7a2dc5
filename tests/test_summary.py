"""The summary gives the lecture's and the papers' figures."""

import pytest
import torch
from torch import nn

from cuda_cnn import cli, create_model
from cuda_cnn.models.summary import Summary, stack, summarize


def summary_of(name: str, *size: int, **options) -> Summary:
    with torch.device("meta"):
        model = create_model(name, **options)
    return summarize(model, size)


def row(summary: Summary, name: str):
    return next(layer for layer in summary.layers if layer.name == name)


def test_three_stacked_3x3_see_7x7():
    channels = 16
    with torch.device("meta"):
        stacked = summarize(stack([3, 3, 3], channels), (channels, 14, 14))
        single = summarize(stack([7], channels), (channels, 14, 14))
    assert [layer.sight[0].field for layer in stacked.layers] == [3, 5, 7]
    assert single.layers[0].sight[0].field == 7
    assert (stacked.parameters, single.parameters) == (27 * channels**2, 49 * channels**2)
    assert single.multiply_adds == 49 * channels**2 * 14 * 14


def test_alexnet():
    summary = summary_of("alexnet", 3, 227, 227)
    conv1 = row(summary, "features.0")
    assert conv1.output == (96, 55, 55)
    assert conv1.multiply_adds == 96 * 55 * 55 * 3 * 11 * 11
    assert conv1.activation_bytes == 96 * 55 * 55 * 4
    assert row(summary, "features.4").multiply_adds == 256 * 27 * 27 * 48 * 5 * 5  # two groups
    assert summary.parameters == 60_965_224
    fields = [row(summary, f"features.{i}").sight[0] for i in (0, 3, 4, 7, 12, 14)]
    assert fields == [(11, 4), (19, 8), (51, 8), (67, 16), (163, 16), (195, 32)]


def test_lenet():
    summary = summary_of("lenet5", 1, 32, 32)
    assert summary.parameters == 60_000
    assert [row(summary, n).sight[0] for n in ("c1", "s2", "c3", "s4", "c5")] == [
        (5, 1),
        (6, 2),
        (14, 2),
        (16, 4),
        (32, 4),
    ]


def test_densenet_connections():
    summary = summary_of("densenet121", 3, 224, 224)
    blocks = {f"features.denseblock{i + 1}": layers for i, layers in enumerate((6, 12, 24, 16))}
    assert summary.connections == {name: (n, n * (n + 1) // 2) for name, n in blocks.items()}
    # Each 3×3 of a block sees two pixels more on either side of its stride than the one before.
    fields = [row(summary, f"features.denseblock1.denselayer{i}.conv2").sight[0].field for i in range(1, 7)]
    assert fields == [11 + 8 * i for i in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet18", 1.8), ("resnet34", 3.6), ("resnet50", 3.8), ("resnet101", 7.6), ("resnet152", 11.3)],
)
def test_resnet_multiply_adds_are_the_papers(name, billions):
    options = {"stride_on": "1x1"} if billions > 3.6 else {}
    assert summary_of(name, 3, 224, 224, **options).multiply_adds == pytest.approx(billions * 1e9, rel=0.03)


def test_googlenet_multiply_adds_are_the_papers():
    """Table 1, in millions, as rounded there; its 54 for 5a does not follow from its own widths."""
    table = {"3a": 128, "3b": 304, "4a": 73, "4b": 88, "4c": 100, "4d": 119, "4e": 170, "5b": 71}
    summary = summary_of("googlenet", 3, 224, 224)
    for module, millions in table.items():
        counted = sum(
            layer.multiply_adds for layer in summary.layers if layer.name.startswith(f"inception{module}.")
        )
        assert counted / 1e6 == pytest.approx(millions, rel=0.025), module


def test_googlenet_branches_join_at_the_widest_field():
    summary = summary_of("googlenet", 3, 224, 224)
    branches = [
        row(summary, f"inception3a.{branch}").sight[0].field for branch in ("branch1.conv", "branch3.1.conv")
    ]
    assert row(summary, "inception3a.concat").sight[0].field == max(branches) == branches[1]


def test_vgg16_multiply_adds():
    assert summary_of("vgg16", 3, 224, 224).multiply_adds == 15_470_264_320


def test_asymmetric_windows_shared_weights_and_no_trace_left():
    with torch.device("meta"):
        shared = nn.Conv2d(2, 2, (3, 5), stride=(1, 2), dilation=(2, 1), bias=False)
        model = nn.Sequential(shared, shared).train()
    summary = summarize(model, (2, 32, 32))
    assert summary.parameters == 2 * 2 * 15
    assert [layer.sight for layer in summary.layers] == [((5, 1), (5, 2)), ((9, 1), (13, 4))]
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_command(capsys):
    assert cli.main(["summary", "3+3+3", "--input", "8x16x16"]) == 0
    *_, last, total = capsys.readouterr().out.splitlines()
    assert "7×7" in last
    assert "1,728" in total
    assert cli.main(["summary", "resnet20", "--option", "shortcut=B", "--option", "num_classes=3"]) == 0
    assert "resnet20, input 3×32×32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "did you mean 'resnet18'"),
        (["resnet18", "--input", "224"], "expected --input CxHxW"),
        (["resnet18", "--option", "shortcut"], "expected --option NAME=VALUE"),
        (["alexnet", "--input", "3x32x32"], "expected input of at least 67×67 pixels, got 32×32"),
    ],
)
def test_wrong_command(arguments, message, capsys):
    assert cli.main(["summary", *arguments]) == 2
    assert message in capsys.readouterr().err
