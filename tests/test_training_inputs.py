"""What does not fit in `cuda-cnn train`, `evaluate` and `predict`: each is named, before the first step."""

import pytest
import torch

from cuda_cnn import cli
from cuda_cnn.train.data import Data, ImageSet
from cuda_cnn.train.loop import Trainer
from cuda_cnn.train.recipes import Recipe

PIL = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def some_data(channels: int = 1, side: int = 32, count: int = 4, classes: str = "abcd") -> Data:
    pictures = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    part = ImageSet(pictures, torch.arange(count) % len(classes))
    return Data("made up", part, part, list(classes), (channels, side, side))


def folder_of_pictures(root, classes=("dark", "light"), count: int = 5, size=(40, 30)) -> str:
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(count):
            PIL.new("RGB", size, (200 * i + j,) * 3).save(root / name / f"{j}.png")
    return f"imagefolder:{root}"


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main([*argv, "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A folder of coloured pictures, and a small network trained on it: (data, run's folder)."""
    data = folder_of_pictures(tmp_path_factory.mktemp("pictures"))
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = out.parent / "recipe.json"
    recipe.write_text(
        '{"model": "alexnet_cifar", "epochs": 1, "batch_size": 4, "threads": 1, "test_crop": 32,'
        ' "augment": [{"name": "crop", "size": 32}, {"name": "colour_noise", "of": "train"}]}'
    )
    options = ["--recipe", str(recipe), "--data", data, "--quiet", "--no-report", "--device", "cpu"]
    assert cli.main(["train", *options, "--out", str(out)]) == 0
    return data, out


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        (
            Recipe("alexnet_cifar"),
            some_data(3, 8),
            "CifarAlexNet: expected input of at least 15×15 pixels, got 8×8",
        ),
        (Recipe("resnet20", {"in_chans": 3}), some_data(1), "CifarResNet: expected 3 input channels, got 1"),
        (
            Recipe("resnet20", augment=[{"name": "colour_noise"}]),
            some_data(1),
            r"ColourNoise: expected pictures of shape \(N, 3, H, W\), got \[1, 1, 32, 32\]",
        ),
        (
            Recipe("resnet20", augment=[{"name": "crop", "size": 40}]),
            some_data(3),
            "crop: expected pictures of at least 40×40 pixels, got 32×32",
        ),
        (
            Recipe("resnet20", test_crop=48),
            some_data(3),
            "expected pictures of at least 48×48 pixels, got 32×32",
        ),
        (
            Recipe("lenet5_modern"),
            some_data(side=64),
            r"gives \[1, 4, 9, 9\] for one picture of \[1, 64, 64\]",
        ),
        (Recipe("lenet5_modern"), some_data(side=28), r"a picture of \[1, 28, 28\]: .* of at least 32×32"),
        (Recipe("lenet5_modern"), some_data(count=0), "made up: no picture to train with"),
    ],
)
def test_before_the_first_step(recipe, data, message):
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, data)


def test_corrupt_pictures_are_skipped_or_refused(capsys, tmp_path, coloured):
    data = folder_of_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "dark" / "broken.png").write_bytes(b"\x89PNG nothing more")
    options = ["--checkpoint", str(coloured[1]), "--data", data]
    status, out, err = run(capsys, "evaluate", *options)
    assert status == 0 and "of 2 test pictures right" in out
    assert "skipped 1 unreadable pictures, the first:" in err and "broken.png" in err
    for command in (
        ["evaluate", *options],
        ["train", "--model", "resnet20", "--data", data, "--out", str(tmp_path / "run")],
    ):
        status, _, err = run(capsys, *command, "--strict")
        assert status == 2 and "broken.png: not a readable picture" in err
    assert not (tmp_path / "run").exists()


def test_folders_without_pictures(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder, message in (
        ("empty", "holds no folders of pictures"),
        ("gone", "is not a folder"),
        ("file", "is not a folder"),
    ):
        status, _, err = run(
            capsys, "train", "--model", "resnet20", "--data", f"imagefolder:{tmp_path / folder}"
        )
        assert status == 2 and message in err and str(tmp_path / folder) in err


def test_a_folder_that_may_not_be_read(capsys, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    status, _, err = run(capsys, "train", "--model", "resnet20", "--data", f"imagefolder:{tmp_path}")
    assert status == 2 and "Permission denied" in err and str(tmp_path) in err


def test_other_classes_than_the_checkpoints(capsys, tmp_path, coloured):
    three = folder_of_pictures(tmp_path / "three", ("dark", "grey", "light"))
    status, _, err = run(capsys, "evaluate", "--checkpoint", str(coloured[1]), "--data", three)
    assert status == 2 and "takes pictures [3, 256, 256] of 2 classes" in err and "of 3 classes" in err
    status, _, err = run(capsys, "train", "--resume", str(coloured[1]), "--data", three)
    assert (
        status == 2
        and "the checkpoint has classes ['dark', 'light'], the data ['dark', 'grey', 'light']" in err
    )
    start = ["--model", "alexnet_cifar", "--data", three, "--init-from", str(coloured[1])]
    status, _, err = run(capsys, "train", *start, "--out", str(tmp_path / "run"))
    assert status == 2 and "gives [1, 3]" not in err and "fc.weight is [2, 576] there and [3, 576]" in err


def test_other_channels_than_the_checkpoints(capsys, coloured):
    pytest.importorskip("sklearn", reason="the bundled digits need scikit-learn")
    status, _, err = run(capsys, "evaluate", "--checkpoint", str(coloured[1]), "--data", "digits")
    assert status == 2 and "takes pictures [3, 256, 256]" in err and "digits has [1, 32, 32]" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "resnet2"], "unknown model 'resnet2': did you mean 'resnet"),
        (["--recipe", "resnet51"], "unknown recipe 'resnet51': did you mean 'resnet50'"),
        (["--data", "imagefolders:x"], "unknown data set 'imagefolders': did you mean 'imagefolder'"),
        (["--optimizer", "nestrov"], "unknown optimizer 'nestrov': did you mean 'nesterov'"),
        (["--schedule", "platau"], "unknown schedule 'platau': did you mean 'plateau'"),
        (["--precision", "bfloat"], "unknown precision 'bfloat': did you mean 'bfloat16'"),
        (["--compile", "inducter"], "unknown backend 'inducter': did you mean 'inductor'"),
    ],
)
def test_unknown_names(capsys, tmp_path, argv, message):
    pytest.importorskip("sklearn", reason="the bundled digits need scikit-learn")
    status, _, err = run(capsys, "train", "--model", "lenet5", *argv, "--out", str(tmp_path / "run"))
    assert status == 2 and message in err
    assert not (tmp_path / "run").exists()


def test_predict_reads_coloured_pictures_and_draws_any_layers_maps(capsys, tmp_path, coloured):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "new.png"
    PIL.new("RGB", (50, 40), (220, 210, 200)).save(picture)
    options = ["--checkpoint", str(coloured[1]), "--out", str(tmp_path / "maps")]
    status, out, _ = run(capsys, "predict", *options, "--maps", "features.0,features.4", str(picture))
    assert status == 0 and out.startswith(f"{picture}: ") and "light" in out
    assert (tmp_path / "maps" / "new_maps.png").stat().st_size > 2000
    status, _, err = run(capsys, "predict", *options, "--maps", "features.99", str(picture))
    assert status == 2 and "no layer 'features.99'" in err
    status, _, err = run(capsys, "predict", *options, "--maps", "fc", str(picture))
    assert status == 2 and "a layer with maps (N, C, H, W) is needed" in err
