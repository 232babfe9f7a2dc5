"""ResNet and GoogLeNet: shortcuts, auxiliary classifiers, branches; dense evaluation."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import PARAMETERS, assert_near, count, on_meta, reals
from torch import Tensor

from cuda_cnn import create_model, list_models
from cuda_cnn.models.googlenet import AuxiliaryCrossEntropy
from cuda_cnn.models.resnet import ZeroPadShortcut

pytestmark = pytest.mark.usefixtures("one_thread")


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
