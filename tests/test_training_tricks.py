"""AlexNet's optimiser and colour noise; crops, flips, scales; tests with several crops, dense and multi-scale."""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from cuda_cnn import cli, create_model
from cuda_cnn.train.augmentation import build
from cuda_cnn.train.colour import IMAGENET_EIGENVALUES, IMAGENET_EIGENVECTORS, ColourNoise
from cuda_cnn.train.crops import (
    Crop,
    Flip,
    ScaleJitter,
    dense_test,
    multi_scale_test,
    resize_shorter_side,
    ten_crop_test,
    ten_crops,
)
from cuda_cnn.train.data import Data, ImageSet
from cuda_cnn.train.loop import Trainer
from cuda_cnn.train.optim import AlexNetSGD
from cuda_cnn.train.optimisation import make_loss, make_optimizer, schedule_factor
from cuda_cnn.train.recipes import Recipe, list_recipes, load_recipe


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pictures(n: int = 4, height: int = 9, width: int = 7, channels: int = 3) -> Tensor:
    """Every pixel is another number."""
    return torch.arange(n * channels * height * width, dtype=torch.float32).view(n, channels, height, width)


# AlexNet's SGD


def quadratic(w: Tensor) -> Tensor:
    return (w * torch.tensor([1.0, 3.0, -2.0])).square().sum() + w.sum()


def test_alexnet_sgd_is_the_papers_rule():
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = AlexNetSGD([weight], lr=0.01)
    w, v = start.clone(), torch.zeros(3, dtype=torch.float64)
    for step in range(12):
        if step == 6:
            optimizer.param_groups[0]["lr"] = 0.001
        epsilon = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        quadratic(weight).backward()
        gradient = weight.grad.clone()
        optimizer.step()
        v = 0.9 * v - 0.0005 * epsilon * w - epsilon * gradient
        w = w + v
        torch.testing.assert_close(weight.detach(), w, rtol=1e-13, atol=0)


def trajectory(optimizer_class: type, lower: bool) -> Tensor:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = optimizer_class([weight], lr=0.01, momentum=0.9, weight_decay=0.0005)
    for step in range(8):
        if lower and step == 4:
            optimizer.param_groups[0]["lr"] = 0.001
        optimizer.zero_grad()
        quadratic(weight).backward()
        optimizer.step()
    return weight.detach()


def test_alexnet_sgd_differs_from_torchs_only_when_the_rate_changes():
    torch.testing.assert_close(
        trajectory(AlexNetSGD, False), trajectory(torch.optim.SGD, False), rtol=1e-12, atol=0
    )
    assert (trajectory(AlexNetSGD, True) - trajectory(torch.optim.SGD, True)).abs().max() > 1e-3


def test_alexnet_sgd_state_and_closure():
    weight = nn.Parameter(torch.ones(3))
    optimizer = AlexNetSGD([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(weight)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == quadratic(torch.ones(3)).item()
    twin = nn.Parameter(weight.detach().clone())
    other = AlexNetSGD([twin], lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure)
    quadratic(twin).backward()
    other.step()
    assert torch.equal(weight, twin)


def test_alexnet_sgd_leaves_weights_without_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.sum().backward()
    AlexNetSGD([used, unused], lr=0.1).step()
    assert (unused == 1).all()
    assert (used < 1).all()


@pytest.mark.parametrize("argument", ["lr", "momentum", "weight_decay"])
def test_alexnet_sgd_refuses(argument):
    with pytest.raises(ValueError, match=f"expected {argument} of at least 0, got -1"):
        AlexNetSGD([nn.Parameter(torch.ones(1))], **{argument: -1.0})


# Colour noise


def test_colour_noise_moves_each_picture_along_the_eigenvectors():
    images = pictures().div(1000)
    noise = ColourNoise(std=0.5, scale=2.0)
    shift = noise(images, generator()) - images
    alpha = torch.randn(4, 3, generator=generator()) * 0.5
    axes, values = torch.tensor(IMAGENET_EIGENVECTORS), torch.tensor(IMAGENET_EIGENVALUES)
    expected = torch.stack([axes @ (a * values) for a in alpha]) / 2.0
    torch.testing.assert_close(shift, expected.view(4, 3, 1, 1).expand_as(shift), rtol=1e-3, atol=1e-6)
    assert len({round(float(s), 4) for s in shift[:, 0, 0, 0]}) == 4


def test_colour_noise_of_a_training_set():
    """Pixels spread along a known axis: its eigenvector comes first, with its variance."""
    axis = torch.tensor([2.0, 1.0, 2.0]) / 3
    amount = torch.randn(50, 1, 8, 8, generator=generator()) * 0.2
    noise = ColourNoise.of(0.5 + amount * axis.view(3, 1, 1))
    first = noise.axes[:, 0]
    torch.testing.assert_close(first.norm(), amount.var(correction=0), rtol=1e-4, atol=0)
    assert (first / first.norm() @ axis).abs().item() == pytest.approx(1, abs=1e-5)
    assert noise.axes[:, 1:].norm() < 1e-6


def test_colour_noise_of_a_recipes_training_set():
    """Channels were divided by `scale`: the axis is that of the pixels before, the shift that of those after."""
    pixels = torch.rand(40, 1, 4, 4, generator=generator()) * torch.tensor([0.5, 0.25, 0.1]).view(3, 1, 1)
    scale = (0.5, 0.25, 0.1)
    train = ImageSet(pixels / torch.tensor(scale).view(3, 1, 1), torch.zeros(40))
    description = {"name": "colour_noise", "of": "train", "std": 1.0, "scale": scale}
    (step,) = build([description], train)
    expected = ColourNoise.of(pixels, 1.0)
    torch.testing.assert_close(step.axes.abs(), expected.axes.abs())
    shift = step(train.images, generator()) - train.images
    torch.testing.assert_close(
        shift[:, 1], shift[:, 0], rtol=1e-3, atol=1e-5
    )  # one axis, levelled by the scale
    with pytest.raises(ValueError, match=r"colour_noise.*unexpected keyword argument 'sdt'"):
        build([{"name": "colour_noise", "of": "train", "sdt": 1.0}], train)


def test_colour_noise_needs_three_channels():
    with pytest.raises(ValueError, match=r"expected pictures of shape \(N, 3, H, W\), got \[2, 1, 4, 4\]"):
        ColourNoise()(torch.zeros(2, 1, 4, 4), generator())


# Crops, flips, scales


def test_crop_takes_every_part():
    images = pictures(n=200).remainder(63)[:, :1]
    parts = Crop(6)(images, generator())
    assert parts.shape == (200, 1, 6, 6)
    corners = parts[:, 0, 0, 0] - images[:, 0, 0, 0]
    tops, lefts = corners // 7, corners % 7
    assert set(tops.tolist()) == {0, 1, 2, 3}
    assert set(lefts.tolist()) == {0, 1}
    for image, part, top, left in zip(images, parts, tops.long(), lefts.long(), strict=True):
        assert torch.equal(part, image[:, top : top + 6, left : left + 6])


def test_crop_after_a_border():
    parts = Crop(9, pad=2, fill=-1.0)(pictures(n=50, height=9, width=9), generator())
    assert parts.shape == (50, 3, 9, 9)
    assert (parts == -1).any()
    with pytest.raises(ValueError, match="expected pictures of at least 12×12 pixels, got 9×7"):
        Crop(12)(pictures(), generator())


def test_flip():
    images = pictures(n=100)
    flipped = Flip()(images, generator())
    mirrored = [torch.equal(f, i.flip(2)) for f, i in zip(flipped, images, strict=True)]
    kept = [torch.equal(f, i) for f, i in zip(flipped, images, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 30 < sum(mirrored) < 70
    assert torch.equal(Flip(0.0)(images, generator()), images)


def test_scale_jitter():
    images = torch.rand(6, 3, 20, 30, generator=generator())
    jitter = ScaleJitter(size=16, smallest=18, largest=40)
    parts = jitter(images, generator(1))
    assert parts.shape == (6, 3, 16, 16)
    assert torch.equal(parts, jitter(images, generator(1)))
    assert not torch.equal(parts, jitter(images, generator(2)))
    assert resize_shorter_side(images, 40).shape[-2:] == (40, 60)
    exact = ScaleJitter(size=20, smallest=20, largest=20)(images, generator())
    assert all(
        any(torch.equal(e, i[:, :, x : x + 20]) for x in range(11))
        for e, i in zip(exact, images, strict=True)
    )
    with pytest.raises(ValueError, match="size ≤ smallest ≤ largest"):
        ScaleJitter(size=32, smallest=16)


def test_recipes_name_the_augmentations():
    steps = build([{"name": "crop", "size": 6, "pad": 1}, {"name": "flip"}, {"name": "colour_noise"}])
    images = pictures()
    for step in steps:
        images = step(images, generator())
    assert images.shape == (4, 3, 6, 6)


# Schedules


def factors(recipe: Recipe, epochs: int, losses: list[float] | None = None) -> list[float]:
    history = [{"train_loss": loss} for loss in losses or [1.0] * epochs]
    return [round(schedule_factor(recipe, e / epochs, history[:e]), 10) for e in range(epochs)]


def test_steps_and_warm_up():
    recipe = Recipe("resnet20", schedule="steps", schedule_args={"at": [0.5, 0.75]}, warm_up=0.25)
    assert factors(recipe, 8) == [0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_plateau_divides_when_the_loss_stops_falling():
    recipe = Recipe("alexnet", schedule="plateau", schedule_args={"patience": 2, "most": 2})
    losses = [1.0, 0.5, 0.499, 0.498, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert factors(recipe, 10, losses) == [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]


def test_decay():
    recipe = Recipe("googlenet", schedule="decay", schedule_args={"every": 2, "factor": 0.5})
    assert factors(recipe, 5) == [1, 1, 0.5, 0.5, 0.25]


def test_wrong_schedules():
    with pytest.raises(ValueError, match=r"schedule 'steps': .*'att'"):
        factors(Recipe("resnet20", schedule="steps", schedule_args={"att": [0.5]}), 1)
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        factors(Recipe("resnet20", schedule="step"), 1)
    with pytest.raises(ValueError, match="expected warm_up of 0 to 1, got 2"):
        Recipe("resnet20", warm_up=2)
    changed = Recipe("resnet20", schedule="steps", schedule_args={"at": [0.1]}).override(schedule="cosine")
    assert changed.schedule_args == {}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_fits_its_network(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = create_model(recipe.model, **recipe.model_args)
        make_loss(recipe, model)
    optimizer = make_optimizer(model.parameters(), recipe)
    assert optimizer.param_groups[0]["lr"] == recipe.lr
    assert 0 < schedule_factor(recipe, 0.9, [{"train_loss": 1.0}] * 20) <= 1
    images = torch.rand(2, 1 if "lenet" in name else 3, *[model.input_size if "lenet" in name else 256] * 2)
    for step in build(recipe.augment):
        images = step(images, generator())
    assert images.shape[-1] == (recipe.test_crop or images.shape[-1])


# Tests with several views


class MeanOfCorner(nn.Module):
    """Scores that tell which crop it saw."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0], torch.zeros(len(x))], 1) / 100


def test_ten_crops():
    images = pictures()
    crops = ten_crops(images, 5)
    assert crops.shape == (10, 4, 3, 5, 5)
    tops_lefts = [(0, 0), (0, 2), (4, 0), (4, 2), (2, 1)]
    for i, (top, left) in enumerate(tops_lefts):
        part = images[:, :, top : top + 5, left : left + 5]
        assert torch.equal(crops[i], part)
        assert torch.equal(crops[5 + i], part.flip(3))
    expected = torch.stack([MeanOfCorner()(crop).softmax(1) for crop in crops]).mean(0)
    torch.testing.assert_close(ten_crop_test(MeanOfCorner(), images, 5), expected, rtol=0, atol=0)


def test_dense_and_multi_scale_test():
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=4).eval()
    images = torch.randn(2, 3, 24, 16, generator=generator())
    with torch.no_grad():
        expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    dense = dense_test(model, images)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-6)
    both = multi_scale_test(dense_test, model, images, [16, 32])
    larger = dense_test(model, resize_shorter_side(images, 32))
    torch.testing.assert_close(both, (dense + larger) / 2, rtol=1e-5, atol=1e-7)


# A whole run


@pytest.mark.parametrize("model", ["googlenet", "resnet20"])
def test_a_network_trains_with_the_papers_tricks(model):
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 36, 36), torch.arange(8) % 2
    train = ImageSet(images, labels)
    data = Data("random", train, train, ["a", "b"], (3, 36, 36))
    augment = [{"name": "crop", "size": 32}, {"name": "flip"}, {"name": "colour_noise"}]
    recipe = Recipe(
        model, epochs=1, batch_size=4, optimizer="alexnet_sgd", weight_decay=5e-4, augment=augment, threads=1
    )
    trainer = Trainer(recipe, data)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit()
    assert len(trainer.history) == 1
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def test_evaluate_with_several_views(tmp_path, capsys):
    torch.manual_seed(0)
    train = ImageSet(torch.rand(10, 1, 32, 32), torch.arange(10) % 10)
    data = Data("digits", train, train, list("0123456789"), (1, 32, 32))
    small = {"depth": 7, "growth_rate": 4}
    recipe = Recipe(
        "densenet40_12",
        model_args=small,
        epochs=1,
        batch_size=5,
        augment=[{"name": "crop", "size": 28}],
        test_crop=28,
        threads=1,
    )
    Trainer(recipe, data).fit(tmp_path)
    command = ["evaluate", "--checkpoint", str(tmp_path)]
    for views in (
        [],
        ["--views", "whole"],
        ["--views", "ten_crop"],
        ["--views", "dense", "--scales", "32,40"],
    ):
        assert cli.main([*command, *views]) == 0
    assert capsys.readouterr().out.count("test pictures right") == 4
    assert cli.main([*command, "--scales", "big"]) == 2
    assert "expected --scales such as 256,384,512, got 'big'" in capsys.readouterr().err


def test_init_from_another_network_is_named(tmp_path, capsys):
    train = ImageSet(torch.rand(4, 1, 32, 32), torch.arange(4))
    data = Data("digits", train, train, list("0123456789"), (1, 32, 32))
    Trainer(Recipe("lenet5_modern", epochs=1, threads=1), data).fit(tmp_path)
    command = ["train", "--init-from", str(tmp_path), "--out", str(tmp_path / "new")]
    assert cli.main(command) == 2
    assert "another network's weights" in capsys.readouterr().err
