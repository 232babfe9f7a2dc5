"""All networks: parameter counts, shapes, options, equality with torchvision's and with torch's layers."""

import copy
import warnings

import pytest
import torch
from model_helpers import (
    PARAMETERS,
    SMALL_DENSENET,
    TORCHVISION,
    assert_near,
    assert_same_network,
    count,
    on_meta,
    on_torch_layers,
    reals,
    shorten_classifier,
)
from torch import nn

from cuda_cnn import create_model, list_models
from cuda_cnn.models.resnet import BasicBlock, Bottleneck, ResNet
from cuda_cnn.models.vgg import VGG

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_network_is_listed():
    assert set(PARAMETERS) <= set(list_models())
    assert list_models("plain*") == [
        "plain110",
        "plain18",
        "plain20",
        "plain32",
        "plain34",
        "plain44",
        "plain56",
    ]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert count(on_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "expected"), [("googlenet", 6_998_552), ("googlenet_torchvision", 6_624_904)]
)
def test_googlenet_without_auxiliaries(name, expected):
    assert count(on_meta(name, aux_logits=False)) == expected


@pytest.mark.parametrize(
    "name", [n for n in PARAMETERS if n != "resnet1202"]
)  # slow to build, like resnet110
def test_classes_channels_and_stages(name):
    model = on_meta(name, num_classes=7, in_chans=2).eval()
    x = torch.empty(2, 2, model.input_size, model.input_size, device="meta")
    assert model(x).shape == (2, 7)
    maps = on_meta(name, in_chans=2, features_only=True).eval()(x)
    assert len(maps) >= 3
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(sides, reverse=True)
    smallest = torch.empty(1, 2, model.min_size, model.min_size, device="meta")
    assert model(smallest).shape == (1, 7)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_torchvision", "vgg11", "densenet121", "googlenet"])
def test_one_pixel_less_than_min_size_leaves_no_map(name):
    model = on_torch_layers(on_meta(name)).eval()
    x = torch.empty(1, 3, model.min_size - 1, model.min_size - 1, device="meta")
    with pytest.raises(
        ValueError, match=f"expected input of at least {model.min_size}×{model.min_size} pixels"
    ):
        model(x)
    with pytest.raises(RuntimeError):
        list(model.stages(x))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "resnet18",
            (3, 64, 64),
            r"ResNet: expected input of 4 dimensions \(N, C, H, W\), got 3 \(shape \[3",
        ),
        ("alexnet", (1, 1, 227, 227), r"AlexNet: expected 3 input channels, got 1"),
        ("vgg11", (1, 3, 16, 224), r"VGG: expected input of at least 32×32 pixels, got 16×224"),
    ],
)
def test_wrong_input(name, shape, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name)(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"stride_on": "5x5"}, "stride_on"),
        ("resnet50", {"shortcut": "D"}, "shortcut"),
        ("vgg11", {"weights_init": "zeros"}, "weights_init"),
        ("alexnet", {"activation": "gelu"}, "activation"),
        ("alexnet", {"devices": ["cpu"]}, "expected two devices, got 1"),
        ("densenet40_12", {"depth": 41}, "expected a depth of 3n"),
        ("densenet_bc100_12", {"depth": 101}, "expected a depth of 6n"),
        ("densenet121", {"compression": 0.0}, "compression"),
        ("googlenet", {"transform_input": True, "in_chans": 1}, "transform_input"),
    ],
)
def test_wrong_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **options)


# torchvision


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = getattr(torchvision.models, TORCHVISION[name])().state_dict()
    ours = on_meta(name).state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize(
    "name",
    ["alexnet_torchvision", "vgg11_bn", "resnet18", "resnet50", "densenet121", "googlenet_torchvision"],
)
def test_numbers_are_torchvisions(name):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = getattr(torchvision.models, TORCHVISION[name])(num_classes=10)
    ours = on_meta(name, num_classes=10)
    if name.startswith(("alexnet", "vgg")):
        ours, theirs = (shorten_classifier(model) for model in (ours, theirs))
    theirs = theirs.to_empty(device="cpu").double()
    torch.manual_seed(0)
    for tensor in theirs.parameters():
        tensor.data.normal_(std=tensor[0].numel() ** -0.5)
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    assert_same_network(ours, theirs, reals(2, 3, 64, 64), 1e-8)


def test_googlenet_transforms_input_as_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = (
        torchvision.models.GoogLeNet(num_classes=3, transform_input=True, init_weights=False).double().eval()
    )
    ours = create_model("googlenet_torchvision", num_classes=3, transform_input=True).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = reals(1, 3, 64, 64)
    assert_near(ours(x), theirs(x), 1e-12, "output")


# Plain torch layers


SMALL = {
    "alexnet": (67, lambda: shorten_classifier(create_model("alexnet", num_classes=5))),
    "alexnet_cifar": (32, lambda: create_model("alexnet_cifar", num_classes=5)),
    "vgg_lrn": (32, lambda: shorten_classifier(VGG([[8], [8], [16, (8, 1)], [8], [512]], 5, lrn=True))),
    "vgg_bn": (32, lambda: shorten_classifier(VGG([[8], [8, 16], [8], [8], [512]], 5, batch_norm=True))),
    "resnet_a": (33, lambda: ResNet(BasicBlock, [2, 1], 5, shortcut="A")),
    "resnet_1x1": (33, lambda: ResNet(Bottleneck, [1, 2], 5, stride_on="1x1")),
    "resnet_3x3": (33, lambda: ResNet(Bottleneck, [1, 2], 5, shortcut="C")),
    "cifar_resnet": (16, lambda: create_model("resnet20", num_classes=5)),
    "cifar_plain": (16, lambda: create_model("plain20", num_classes=5)),
    "densenet": (33, lambda: create_model("densenet121", num_classes=5, **SMALL_DENSENET)),
    "cifar_densenet": (8, lambda: create_model("densenet40_12", num_classes=5, depth=10)),
    "googlenet": (31, lambda: create_model("googlenet", num_classes=5)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SMALL)
def test_numbers_are_those_of_torch_layers(name, layout):
    torch.manual_seed(0)
    side, build = SMALL[name]
    # Batch normalisation of few values magnifies rounding: only nets without it are compared in float32.
    dtype, relative = (
        (torch.float32, 1e-4) if name in ("alexnet", "alexnet_cifar", "googlenet") else (torch.float64, 1e-8)
    )
    model = build().to(dtype=dtype, memory_format=layout)
    x = reals(2, 3, side, side, dtype=dtype).contiguous(memory_format=layout)
    assert_same_network(model, on_torch_layers(model), x, relative)
