"""LeNet-5 against its paper: counts, C3's table, initialisation, drawings, both losses."""

import math

import pytest
import torch
from torch.nn import functional as TF

from cuda_cnn import create_model, list_models
from cuda_cnn.models.lenet import C3_TABLE, EuclideanLoss, MAPLoss, TableConv2d
from cuda_cnn.models.rbf import CHARACTERS, EuclideanRBF, ascii_drawing, bitmaps


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts_are_the_papers():
    model = create_model("lenet5")
    counts = {name: trainable(getattr(model, name)) for name in ("c1", "s2", "c3", "s4", "c5", "f6", "rbf")}
    assert counts == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48120, "f6": 10164, "rbf": 0}
    assert trainable(model) == 60_000


def test_layer_shapes_are_the_papers():
    model = create_model("lenet5")
    shapes = {}
    names = ("c1", "s2", "c3", "s4", "c5")
    for name in names:
        getattr(model, name).register_forward_hook(
            lambda m, i, o, n=name: shapes.update({n: list(o.shape[1:])})
        )
    model(torch.randn(2, 1, 32, 32))
    assert [shapes[n] for n in names] == [
        [6, 28, 28],
        [6, 14, 14],
        [16, 10, 10],
        [16, 5, 5],
        [120, 1, 1],
    ]


def test_c3_connects_sixty_pairs_and_no_others():
    table = [set(maps) for maps in C3_TABLE]
    assert sum(map(len, table)) == 60
    c3 = create_model("lenet5").c3
    connected = c3.dense_weight().detach().abs().sum((2, 3)) > 0
    assert [set(row.nonzero().flatten().tolist()) for row in connected] == table


def test_c3_is_one_convolution_equal_to_sixty():
    torch.manual_seed(0)
    c3 = create_model("lenet5").c3.double()
    x = torch.randn(2, 6, 14, 14, dtype=torch.float64)
    expected = c3.bias.detach()[:, None, None].expand(2, 16, 10, 10).clone()
    pair = 0
    for o, maps in enumerate(C3_TABLE):
        for i in maps:
            expected[:, o] += TF.conv2d(x[:, i : i + 1], c3.weight.detach()[pair][None, None])[:, 0]
            pair += 1
    torch.testing.assert_close(c3(x).detach(), expected, rtol=1e-12, atol=1e-12)


def test_c3_gradient_reaches_every_weight():
    c3 = TableConv2d(3, ((0, 1), (2,)), 2).double()
    torch.manual_seed(1)
    for p in c3.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(c3, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, c3.weight, c3.bias))


def test_initialisation_is_uniform_within_fan_in():
    torch.manual_seed(0)
    model = create_model("lenet5")
    limits = {"c1": 2.4 / 25, "s2": 0.6, "s4": 0.6, "c5": 2.4 / 400, "f6": 2.4 / 120}
    for name, limit in limits.items():
        for p in getattr(model, name).parameters():
            assert p.abs().max() <= limit
    assert model.c5.weight.abs().max() > 0.99 * 2.4 / 400
    assert model.c5.weight.std().item() == pytest.approx(2.4 / 400 / math.sqrt(3), rel=0.02)
    for pairs, bias, maps in zip(model.c3.weight.split([len(m) for m in C3_TABLE]), model.c3.bias, C3_TABLE):
        limit = 2.4 / (25 * len(maps))
        assert 0.8 * limit < pairs.abs().max() <= limit and bias.abs() <= limit


@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
def test_forward_is_the_papers_formula(squash):
    torch.manual_seed(0)
    model = create_model("lenet5", squash=squash).double()
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)

    def tanh(a):
        return 1.7159 * torch.tanh(2 / 3 * a)

    f = tanh if squash == "tanh" else torch.sigmoid

    def subsample(layer, x):
        total = x.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2))
        return f(total * layer.coefficient[:, None, None] + layer.bias[:, None, None])

    h = subsample(model.s2, f(TF.conv2d(x, model.c1.weight, model.c1.bias)))
    h = subsample(model.s4, f(TF.conv2d(h, model.c3.dense_weight(), model.c3.bias)))
    h = f(TF.conv2d(h, model.c5.weight, model.c5.bias))
    f6 = tanh(TF.conv2d(h, model.f6.weight, model.f6.bias)).flatten(1)
    expected = torch.stack([((row - bitmaps("0123456789").double()) ** 2).sum(1) for row in f6])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_larger_input_gives_a_map_of_the_same_answers():
    torch.manual_seed(0)
    model = create_model("lenet5").double()
    x = torch.randn(1, 1, 40, 36, dtype=torch.float64)
    out = model(x)
    assert out.shape == (1, 10, 3, 2)
    torch.testing.assert_close(out[:, :, 2, 1], model(x[:, :, 8:40, 4:36]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (1, 1, 32, 31), (1, 32, 32)])
def test_too_small_input_is_named(shape):
    for name in ("lenet5", "lenet5_modern"):
        with pytest.raises(RuntimeError, match=r"at least 32×32, got shape \["):
            create_model(name)(torch.zeros(shape))


def test_modern_form():
    model = create_model("lenet5_modern", num_classes=7, in_chans=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert trainable(create_model("lenet5_modern")) == 61_706


def test_every_printable_character_has_its_own_drawing():
    assert sorted(CHARACTERS) == [chr(c) for c in range(32, 127)]
    drawings = bitmaps(CHARACTERS)
    assert drawings.shape == (95, 84) and set(drawings.unique().tolist()) == {-1.0, 1.0}
    assert len({tuple(d.tolist()) for d in drawings}) == 95


def test_a_network_without_data_leaves_the_drawings_alone():
    with torch.device("meta"):
        assert create_model("lenet5").rbf.bitmaps.is_meta
    assert create_model("lenet5").rbf.bitmaps.sum() < 0


def test_digits_are_far_apart():
    apart = torch.pdist(bitmaps("0123456789")) ** 2
    assert apart.min().round() >= 4 * 18  # 18 of 84 pixels


def test_drawings_look_like_their_characters():
    assert ascii_drawing(bitmaps("7")[0], " #") == [
        "#######",
        "#######",
        "     ##",
        "    ## ",
        "    ## ",
        "   ##  ",
        "   ##  ",
        "  ##   ",
        "  ##   ",
        "  ##   ",
        "       ",
        "       ",
    ]


def test_rbf_is_zero_on_its_own_drawing():
    rbf = EuclideanRBF("AB~ ")
    out = rbf(bitmaps("AB~ "))
    assert out.diagonal().eq(0).all() and (out + torch.eye(4)).gt(0).all()
    maps = torch.randn(2, 84, 3, 1)
    assert torch.allclose(rbf(maps)[:, :, 1, 0], rbf(maps[:, :, 1, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": "aé"}, "'é' has no drawing"),
        ({"classes": "aa"}, "different characters"),
        ({"classes": ""}, "different characters"),
        ({"num_classes": 96}, "num_classes from 1 to 95"),
        ({"num_classes": 0}, "num_classes from 1 to 95"),
        ({"num_classes": 3, "classes": "ab"}, "does not fit the 2 characters"),
        ({"squash": "relu"}, "expected squash 'tanh' or 'sigmoid'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("lenet5", **arguments)


@pytest.mark.parametrize("shape", [(84,), (2, 83), (2, 84, 1)])
def test_rbf_names_a_wrong_shape(shape):
    with pytest.raises(RuntimeError, match="euclidean_rbf: expected input"):
        EuclideanRBF()(torch.zeros(shape))


def test_letters_can_be_asked_for():
    model = create_model("lenet5", classes="LeNt")
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    assert torch.equal(model.rbf.bitmaps, bitmaps("LeNt"))
    assert create_model("lenet5", num_classes=12).rbf.classes == "0123456789AB"


def test_losses_are_equations_8_and_9():
    torch.manual_seed(0)
    y, target = torch.rand(5, 10, dtype=torch.float64) * 4, torch.tensor([3, 1, 4, 1, 5])
    right = [y[p, d].item() for p, d in enumerate(target.tolist())]
    assert EuclideanLoss()(y, target).item() == pytest.approx(sum(right) / 5, rel=1e-12)
    for j in (0.1, 1.0, 30.0):
        terms = [math.log(math.exp(-j) + sum(math.exp(-v) for v in row.tolist())) for row in y]
        expected = sum(r + t for r, t in zip(right, terms)) / 5
        assert MAPLoss(j)(y, target).item() == pytest.approx(expected, rel=1e-12)


def test_map_loss_does_not_overflow_and_takes_maps():
    y = torch.full((2, 3, 4, 5), 1e4, requires_grad=True)
    loss = MAPLoss()(y, torch.zeros(2, 4, 5, dtype=torch.long))
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all()


@pytest.mark.parametrize("j", [0.0, -1.0, float("nan"), float("inf")])
def test_map_loss_names_a_bad_constant(j):
    with pytest.raises(ValueError, match="expected j > 0"):
        MAPLoss(j)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_modern"])
def test_features_only(name):
    maps = create_model(name, features_only=True)(torch.randn(2, 1, 32, 32))
    assert [list(m.shape) for m in maps] == [[2, 6, 14, 14], [2, 16, 5, 5], [2, 120, 1, 1]]


def test_registry_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown model 'lenet6': did you mean 'lenet5'"):
        create_model("lenet6")
    with pytest.raises(TypeError, match="squish"):
        create_model("lenet5", squish="tanh")
    assert list_models("lenet*") == ["lenet5", "lenet5_modern"]
    assert list_models("no such thing") == []
