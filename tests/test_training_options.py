"""The options of a step: mixed precision, accumulation, running average, layout, compilation, label smoothing."""

import pytest
import torch

from cuda_cnn import cli
from cuda_cnn.train.checkpoint import load_checkpoint, restore_model
from cuda_cnn.train.data import Data, ImageSet
from cuda_cnn.train.diagnose import NonFiniteError
from cuda_cnn.train.evaluation import Evaluation, batches, evaluate
from cuda_cnn.train.logs import TensorBoard
from cuda_cnn.train.loop import Interrupted, Trainer
from cuda_cnn.train.recipes import Recipe
from cuda_cnn.train.report import write_report

RECIPE = Recipe("lenet5_modern", epochs=2, batch_size=8, lr=0.02, momentum=0.9, threads=1)


def some_data(count: int = 20, channels: int = 1, side: int = 32) -> Data:
    generator = torch.Generator().manual_seed(0)
    sets = [
        ImageSet(torch.rand(n, channels, side, side, generator=generator), torch.arange(n) % 10)
        for n in (count, 10)
    ]
    return Data("noise", *sets, list("0123456789"), (channels, side, side))


def trained(**options) -> Trainer:
    trainer = Trainer(RECIPE.override(**options), some_data(), seed=3)
    trainer.fit()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row["train_loss"] for row in trainer.history]


@pytest.fixture(scope="module")
def plain() -> Trainer:
    return trained()


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"channels_last": True}, {"compile": "aot_eager"}])
def test_the_same_numbers_another_way(plain, options):
    other = trained(**options)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, rtol=1e-3, atol=1e-6)
    if "channels_last" in options:
        assert other.model.c3.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_batch_may_be_one_picture(plain):
    assert losses(trained(accumulate=100)) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_that_of_the_maps_alone(precision):
    seen = set()
    trainer = Trainer(RECIPE.override(precision=precision), some_data(), seed=3)
    trainer.model.c3.register_forward_hook(lambda m, i, output: seen.add((m.training, output.dtype)))
    trainer.fit()
    assert seen == {(True, getattr(torch, precision)), (False, torch.float32)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "roundoff"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_mixed_step_has_the_loss_of_a_full_one(precision, roundoff):
    found = []
    for name in ("float32", precision):
        trainer = Trainer(RECIPE.override(precision=name), some_data(), seed=3)
        images, labels = trainer.data.train[:8]
        found.append(trainer.optimise(images, labels)[0])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(
        found[0], rel=8 * roundoff
    )  # five layers, each with its weights and maps rounded


def test_float16_gradients_are_scaled():
    trainer = trained(precision="float16")
    assert trainer.state()["scaler"]["scale"] > 1
    assert trained(precision="bfloat16").state()["scaler"] == {}


def test_running_average_is_that_of_the_steps():
    trainer = Trainer(RECIPE.override(average=0.9, epochs=1), some_data(), seed=3)
    expected, raw = None, trainer.optimise.model.output.bias
    step = trainer.optimise.optimizer.step

    def after(*arguments, **keywords):
        nonlocal expected
        step(*arguments, **keywords)
        expected = raw.detach().clone() if expected is None else 0.9 * expected + 0.1 * raw.detach()

    trainer.optimise.optimizer.step = after
    result = trainer.fit()
    torch.testing.assert_close(trainer.model.output.bias, expected)
    assert not torch.equal(trainer.model.output.bias, raw)
    assert torch.equal(result.scores, evaluate(trainer.model, trainer.data.test).scores)


def test_averaged_weights_are_the_checkpoints(tmp_path):
    trainer = Trainer(RECIPE.override(average=0.9), some_data(), seed=3)
    trainer.fit(tmp_path)
    model = restore_model(load_checkpoint(tmp_path / "weights.safetensors"))
    assert torch.equal(model.output.bias, trainer.model.output.bias)


def test_label_smoothing():
    trainer = Trainer(RECIPE.override(loss_args={"label_smoothing": 0.1}), some_data())
    scores, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    log_p = scores.log_softmax(1)
    expected = -(0.9 * log_p[range(4), labels] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(trainer.optimise.loss(scores, labels), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"average": 0.9, "accumulate": 2},
        {"precision": "float16"},
        {"model": "alexnet_cifar", "model_args": {"dropout": 0.5}},
    ],
    ids=["average", "float16", "dropout"],
)
def test_resumes_to_the_same_bits(options, tmp_path):
    recipe = RECIPE.override(**options)
    unbroken = Trainer(recipe, some_data(), seed=3)
    unbroken.fit()
    broken = Trainer(recipe, some_data(), seed=3)
    step, count = broken._train_step, 0

    def stop_at_the_fourth(*batch):
        nonlocal count
        count += 1
        if count == 4:
            broken._stop.set()
        return step(*batch)

    broken._train_step = stop_at_the_fourth
    with pytest.raises(Interrupted, match="epoch 2, step 1"):
        broken.fit(tmp_path)
    torch.manual_seed(999)
    resumed = Trainer(recipe, some_data(), seed=3)
    resumed.restore(load_checkpoint(tmp_path))
    resumed.fit()
    assert resumed.history == unbroken.history
    for key in ("weights", "raw_weights"):
        for name, weight in unbroken.state().get(key, {}).items():
            assert torch.equal(weight, resumed.state()[key][name]), (key, name)


def test_reading_files_leaves_the_random_state_alone():
    pairs = [(image, int(label)) for image, label in zip(some_data().train.images, some_data().train.labels)]
    before = torch.get_rng_state()
    assert len(list(batches(pairs, torch.arange(20).split(8)))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoint_within_an_epoch(tmp_path, monkeypatch):
    trainer = Trainer(RECIPE.override(epochs=1), some_data(), seed=3)
    saved = []
    monkeypatch.setattr(trainer, "_save", lambda folder: saved.append((trainer.epoch, trainer.step)))
    trainer.fit(tmp_path, save_every=2)
    assert saved == [(0, 2), (1, 0)]


@pytest.mark.parametrize("options", [{"compile": "aot_eager"}, {"precision": "bfloat16"}, {"accumulate": 2}])
def test_nan_names_the_layer_and_leaves_the_weights(options):
    trainer = Trainer(RECIPE.override(**options), some_data())
    with torch.no_grad():
        trainer.model.c5.weight[3] = float("nan")
    before = trainer.model.output.weight.clone()
    with pytest.raises(
        NonFiniteError, match=r"nan in epoch 1, step 1: .*layer 'c5' \(Conv2d\), in its weight"
    ):
        trainer.fit()
    assert torch.equal(trainer.model.output.weight, before)


def test_overflow_of_float16_names_the_layer():
    trainer = Trainer(RECIPE.override(precision="float16"), some_data())
    with torch.no_grad():
        trainer.model.c3.weight.fill_(1e4)
    with pytest.raises(NonFiniteError, match="layer 'c3'"):
        trainer.fit()


def test_worst_mistakes_come_first():
    said = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [5, 0, 0]])
    result = Evaluation(said, torch.tensor([0, 0, 2, 1]))
    assert result.worst(5) == [3, 1, 2]
    assert result.worst(1) == [3]


@pytest.mark.parametrize("channels", [1, 3])
def test_report_is_one_page_with_its_pictures(tmp_path, channels):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    data = some_data(channels=channels)
    data.classes[0] = "<zero>"
    trainer = Trainer(RECIPE, data)
    page = write_report(tmp_path, trainer, trainer.fit()).read_text(encoding="utf-8")
    names = ("curves", "confusion", "worst", "filters", "feature_maps")
    assert all((tmp_path / "pictures" / f"{name}.png").stat().st_size > 2000 for name in names)
    assert page.count('src="data:image/png;base64,iVBOR') == len(names)
    assert "http" not in page and "<zero>" not in page.replace("&lt;zero&gt;", "")
    assert "lenet5_modern on noise" in page and "batch_size" in page


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as log:
        log({"epoch": 1, "train_loss": 0.5})
        log({"epoch": 2, "train_loss": 0.25})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "unknown precision 'float8': did you mean 'float"),
        ({"accumulate": 0}, "accumulate of at least 1, got 0"),
        ({"average": 1.0}, "average of 0 to below 1, got 1.0"),
        ({"loaders": -1}, "loaders of at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RECIPE.override(**options)


def test_options_of_the_command(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the bundled digits need scikit-learn")
    out = str(tmp_path / "run")
    options = [
        "--model",
        "lenet5_modern",
        "--epochs",
        "1",
        "--batch-size",
        "500",
        "--quiet",
        "--device",
        "cpu",
    ]
    extras = [
        "--average",
        "0.5",
        "--accumulate",
        "2",
        "--label-smoothing",
        "0.1",
        "--warm-up",
        "0.5",
        "--tensorboard",
    ]
    assert (
        cli.main(["train", *options, *extras, "--channels-last", "--precision", "bfloat16", "--out", out])
        == 0
    )
    recipe = load_checkpoint(out)["recipe"]
    assert (recipe["average"], recipe["accumulate"], recipe["channels_last"]) == (0.5, 2, True)
    assert (recipe["precision"], recipe["warm_up"]) == ("bfloat16", 0.5)
    assert recipe["loss_args"] == {"label_smoothing": 0.1}
    assert (tmp_path / "run" / "report.html").is_file() and any((tmp_path / "run" / "tensorboard").iterdir())
    capsys.readouterr()
    assert cli.main(["train", "--resume", out, "--accumulate", "3"]) == 2
    assert "trained with accumulate 2: it cannot go on with 3" in capsys.readouterr().err
