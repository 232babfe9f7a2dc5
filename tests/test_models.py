"""The networks: parameter counts, shapes, options, equality with torchvision's and with torch's layers."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_cnn.nn
from cuda_cnn import create_model, list_models
from cuda_cnn.models.densenet import DenseBlock, DenseNet
from cuda_cnn.models.googlenet import AuxiliaryCrossEntropy
from cuda_cnn.models.resnet import BasicBlock, Bottleneck, ResNet, ZeroPadShortcut
from cuda_cnn.models.vgg import VGG, init_from_shallower

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps of a few pixels: waiting for a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def on_torch_layers(model: nn.Module) -> nn.Module:
    """A copy whose layers are torch.nn's own."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module).__module__ == cuda_cnn.nn.__name__ and type(module) is not cuda_cnn.nn.Concat:
            module.__class__ = type(module).__mro__[1]
    return twin


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


# AlexNet


def test_alexnet_layer_shapes():
    model = on_meta("alexnet").eval()
    x = torch.empty(1, 3, 227, 227, device="meta")
    shapes = []
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [
        *((96, 55, 55), (96, 27, 27), (256, 27, 27), (256, 13, 13)),
        *((384, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6)),
    ]


def test_alexnet_initialisation():
    torch.manual_seed(0)
    model = create_model("alexnet")
    for i, bias in {0: 0.0, 4: 1.0, 8: 0.0, 10: 1.0, 12: 1.0}.items():
        assert (model.features[i].bias == bias).all()
        assert model.features[i].weight.std().item() == pytest.approx(0.01, rel=0.02)
    for i, bias in {1: 1.0, 4: 1.0, 6: 0.0}.items():
        assert (model.classifier[i].bias == bias).all()


def small_alexnet(**options) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("alexnet", num_classes=5, dropout=0.0, **options)
    for p in model.parameters():  # so that every layer matters
        p.data.normal_(std=0.05)
    return model


def test_alexnet_on_two_devices():
    whole = small_alexnet()
    towers = create_model("alexnet", num_classes=5, dropout=0.0, devices=("cpu", "cpu"))
    towers.load_state_dict(whole.state_dict())
    assert count(towers) == count(whole)
    x = reals(2, 3, 67, 67, dtype=torch.float32)
    a, b = whole(x), towers(x)
    assert_near(b, a, 1e-5, "output")
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    for t, (first, last) in enumerate([(0, 48), (48, 96)]):
        mine = towers.towers[t].features[0].weight.grad
        assert_near(mine, whole.features[0].weight.grad[first:last], 1e-4, f"conv1 of tower {t}")
    for mine, theirs in zip(towers.forward_features(x), whole.forward_features(x), strict=True):
        assert_near(mine, theirs, 1e-5, "stage")


def test_alexnets_towers_move_and_cast_as_any_module():
    towers = on_meta("alexnet", num_classes=5, devices=("meta", "meta")).to(torch.float64)
    assert towers(torch.empty(2, 3, 227, 227, device="meta", dtype=torch.float64)).dtype is torch.float64
    trainer_form = on_meta("alexnet", devices=("meta", "meta")).to(memory_format=torch.channels_last)
    assert trainer_form.devices == [torch.device("meta")] * 2


def test_alexnet_checkpoints_pass_between_the_forms():
    whole = small_alexnet()
    towers = create_model("alexnet", num_classes=5, devices=("cpu", "cpu"))
    towers.load_state_dict(whole.state_dict())
    state = towers.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in whole.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        towers.load_state_dict({})


# VGG


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n.startswith("vgg")])
def test_vgg_depth_is_its_name(name):
    layers = [m for m in on_meta(name).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name[3:5])
    ones = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(ones) == (3 if name.startswith("vgg16c") else 0)


def test_vgg_starts_from_a_shallower_one():
    torch.manual_seed(0)
    a = create_model("vgg11", num_classes=2)
    d = on_meta("vgg16", num_classes=2).to_empty(device="cpu")
    for p in d.parameters():
        p.data.zero_()
    init_from_shallower(d, a)
    for into, source in [(0, 0), (5, 3), (10, 6), (12, 8)]:
        assert torch.equal(d.features[into].weight, a.features[source].weight)
    assert torch.equal(d.classifier[6].weight, a.classifier[6].weight)
    assert not d.features[2].weight.any()
    with pytest.raises(ValueError, match="cannot start from"):
        init_from_shallower(on_meta("vgg16", num_classes=3), a)


# ResNet


def test_resnet_stride_and_shortcuts():
    paper, torchvisions = on_meta("resnet50", stride_on="1x1"), on_meta("resnet50")
    assert (paper.layer2[0].conv1.stride, paper.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (torchvisions.layer2[0].conv1.stride, torchvisions.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    counts = {s: count(on_meta("resnet34", shortcut=s)) for s in ("none", "A", "B", "C")}
    assert counts["none"] == counts["A"] == PARAMETERS["plain34"]
    assert counts["B"] == PARAMETERS["resnet34"] < counts["C"]


def test_zero_padded_shortcut():
    x = reals(2, 3, 5, 5)
    y = ZeroPadShortcut(extra_planes=4, stride=2)(x)
    assert y.shape == (2, 7, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


@pytest.mark.parametrize(("name", "passes"), [("resnet20", True), ("plain20", False)])
def test_only_a_residual_block_passes_its_input_on(name, passes):
    block = create_model(name).layer1[1].eval()
    block.conv2.weight.data.zero_()
    x = reals(1, 16, 4, 4, dtype=torch.float32).abs()
    assert torch.equal(block(x), x if passes else torch.zeros_like(x))


def test_resnet_initialisation():
    torch.manual_seed(0)
    model = create_model("resnet18", zero_init_residual=True)
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)  # fan-out
    assert not model.layer1[0].bn2.weight.any()


# DenseNet


def dense_block(**options) -> DenseBlock:
    torch.manual_seed(0)
    options = {"bn_size": 2, "drop_rate": 0.0, "memory_efficient": False} | options
    return DenseBlock(3, 4, 2, **options).double()


def joined(block: DenseBlock, x: Tensor) -> Tensor:
    """The block by its definition: every layer reads the concatenation of all before it."""
    for layer in block.values():
        out = layer.conv1(F.relu(layer.norm1(x)))
        if layer.bottleneck:
            out = layer.conv2(F.relu(layer.norm2(out)))
        x = torch.cat([x, out], 1)
    return x


@pytest.mark.parametrize("bn_size", [0, 2])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dense_block_is_its_definition(bn_size, memory_efficient, layout):
    block = dense_block(bn_size=bn_size, memory_efficient=memory_efficient)
    twin = on_torch_layers(block)
    a = reals(2, 4, 5, 3).contiguous(memory_format=layout).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = block(a), joined(twin, b)
    assert_near(y, expected, 1e-12, "output")
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert_near(a.grad, b.grad, 1e-10, "input gradient")
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert_near(p.grad, q.grad, 1e-9, name)
    for (name, p), q in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert_near(p, q, 1e-12, name)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_dense_block_derivatives(memory_efficient):
    block = dense_block(memory_efficient=memory_efficient)
    x = reals(2, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(block, (x,), fast_mode=True)


def test_dense_block_serves_two_inputs_before_one_backward():
    block = dense_block().eval()
    a, b = (reals(2, 4, 3, 3, seed=s).requires_grad_() for s in (0, 1))
    (block(a).sum() * block(b).sum()).backward()
    c, d = (t.detach().clone().requires_grad_() for t in (a, b))
    (joined(block, c).sum() * joined(block, d).sum()).backward()
    assert_near(a.grad, c.grad, 1e-12, "first")
    assert_near(b.grad, d.grad, 1e-12, "second")


def test_dense_block_under_transforms():
    block = dense_block().eval()
    x = reals(2, 4, 3, 3)
    expected = joined(block, x)
    exported = torch.export.export(block, (x,)).module()
    assert_near(exported(x), expected, 1e-12, "torch.export")
    gradient = torch.func.grad(lambda t: block(t).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    joined(block, leaf).pow(2).sum().backward()
    assert_near(gradient, leaf.grad, 1e-12, "torch.func.grad")


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that a training step keeps for its backward pass, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(storage.nbytes() for storage in kept.values())
    y.sum().backward()
    return total


def test_dense_block_keeps_one_buffer_for_all_its_maps():
    planes, growth, layers, pixels = 4, 2, 3, 2 * 5 * 7
    x = reals(2, planes, 5, 7).requires_grad_()
    efficient = kept_bytes(dense_block(memory_efficient=True), x)
    plain = kept_bytes(dense_block(), x)
    buffer = (planes + layers * growth) * pixels * 8
    bottlenecks = layers * 2 * growth * pixels * 8
    assert (
        buffer + bottlenecks <= efficient <= buffer + bottlenecks + 2_000
    )  # and vectors of one value a channel
    normalised = sum(planes + i * growth for i in range(layers)) * pixels * 8
    assert plain <= buffer + 2 * bottlenecks + normalised + 2_000


def test_memory_efficient_training_gives_the_same_numbers():
    results = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = create_model(
            "densenet121", num_classes=3, memory_efficient=memory_efficient, **SMALL_DENSENET
        )
        model(reals(2, 3, 33, 33, dtype=torch.float32)).pow(2).sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, efficient in zip(*results, strict=True):
        assert torch.equal(plain, efficient)


def test_dense_connections():
    for name, block in on_meta("densenet121").features.named_children():
        if isinstance(block, DenseBlock):
            assert block.connections == len(block) * (len(block) + 1) // 2, name


def test_densenet_options():
    model = on_meta("densenet_bc100_12", depth=40, growth_rate=24, compression=0.25)
    assert [len(m) for m in model.features if isinstance(m, DenseBlock)] == [6, 6, 6]
    assert model.features.conv0.out_channels == 48
    assert model.features.transition1.conv.out_channels == (48 + 6 * 24) // 4
    assert isinstance(model, DenseNet)
    assert on_meta("densenet40_12").features.transition1.conv.out_channels == 16 + 12 * 12


# GoogLeNet


def test_googlenet_auxiliaries():
    torch.manual_seed(0)
    model = create_model("googlenet", num_classes=4)
    x = reals(2, 3, 64, 64, dtype=torch.float32)
    outputs = model(x)
    target = torch.tensor([1, 3])
    auxiliary_loss = AuxiliaryCrossEntropy()
    losses = [F.cross_entropy(y, target) for y in outputs]
    assert_near(auxiliary_loss(outputs, target), losses[0] + 0.3 * (losses[1] + losses[2]), 1e-6, "loss")
    assert torch.equal(auxiliary_loss(outputs.logits, target), losses[0])
    assert isinstance(model.eval()(x), Tensor)
    model.aux_logits = False
    assert isinstance(model.train()(x), Tensor)


def test_googlenet_branches():
    kernels = {
        name: on_meta(name).inception3a.branch3[1].conv.kernel_size for name in list_models("googlenet*")
    }
    assert kernels == {"googlenet": (5, 5), "googlenet_torchvision": (3, 3)}


# Dense evaluation


@pytest.mark.parametrize(("name", "side"), [("alexnet", 227), ("resnet18", 64)])
def test_dense_evaluation_is_forward_at_the_trained_size(name, side):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).eval()
    x = reals(1, 3, side, side, dtype=torch.float32)
    with torch.no_grad():
        scores, expected = model.forward_dense(x), model(x)
        assert_near(scores.mean((2, 3)), expected, 1e-4, "logits")


def test_dense_evaluation_of_a_larger_and_a_small_image():
    model = on_meta("vgg11", num_classes=5).eval()
    assert model.forward_dense(torch.empty(1, 3, 288, 256, device="meta")).shape == (1, 5, 3, 2)
    with pytest.raises(ValueError, match="at least 7×7, got 4×4"):
        model.forward_dense(torch.empty(1, 3, 128, 128, device="meta"))
