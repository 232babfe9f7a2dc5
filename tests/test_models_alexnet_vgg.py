"""AlexNet and VGG: layers, initialisation, two devices, starting from a shallower network."""

import pytest
import torch
from model_helpers import PARAMETERS, assert_near, count, on_meta, reals
from torch import nn

from cuda_cnn import create_model
from cuda_cnn.models.vgg import init_from_shallower

pytestmark = pytest.mark.usefixtures("one_thread")


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
