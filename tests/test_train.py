"""Training: repeatable, resumable to the same bits, and clear about everything that can go wrong."""

import errno
import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch

from cuda_cnn import create_model
from cuda_cnn.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    write_atomic,
)
from cuda_cnn.train.data import Data, ImageSet, load_data
from cuda_cnn.train.diagnose import NonFiniteError, first_non_finite
from cuda_cnn.train.evaluation import Evaluation, evaluate, scores
from cuda_cnn.train.loop import Interrupted, Trainer
from cuda_cnn.train.recipes import Recipe, list_recipes, load_recipe

pytest.importorskip("sklearn", reason="the bundled digits need scikit-learn")
pytest.importorskip("safetensors", reason="weights.safetensors needs safetensors")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tests run side by side: two threads each would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(one_thread) -> Data:
    """A few of the digits, so that an epoch is seven steps."""
    digits = load_data("digits")
    train = ImageSet(digits.train.images[:100], digits.train.labels[:100])
    test = ImageSet(digits.test.images[:40], digits.test.labels[:40])
    return Data("digits", train, test, digits.classes, digits.shape)


RECIPE = load_recipe("lenet5").override(epochs=3, batch_size=16)


def trainer(data, recipe=RECIPE, seed=5) -> Trainer:
    return Trainer(recipe, data, seed)


def assert_same(one: dict, other: dict) -> None:
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    moments = [s["optimizer"]["state"] for s in (one, other)]
    for index, values in moments[0].items():
        for key, value in values.items():
            assert torch.equal(value, moments[1][index][key]), (index, key)
    assert one["history"] == other["history"]


@pytest.fixture(scope="module")
def unbroken(data) -> dict:
    run = trainer(data)
    run.fit()
    return run.state()


def test_the_same_seed_gives_the_same_bits(data, unbroken):
    again = trainer(data)
    again.fit()
    assert_same(unbroken, again.state())


@pytest.mark.parametrize("stop_after", [1, 7, 11])
def test_resumed_run_equals_an_unbroken_one(data, unbroken, tmp_path, stop_after, monkeypatch):
    broken = trainer(data)
    step, steps = broken._train_step, []

    def stop_there(*batch):
        result = step(*batch)
        steps.append(None)
        if len(steps) == stop_after:
            broken._stop.set()
        return result

    monkeypatch.setattr(broken, "_train_step", stop_there)
    with pytest.raises(Interrupted, match="stopped in epoch"):
        broken.fit(tmp_path)
    torch.manual_seed(999)  # whatever happened to the random state meanwhile
    resumed = trainer(data)
    resumed.restore(load_checkpoint(tmp_path))
    resumed.fit(tmp_path)
    assert_same(unbroken, resumed.state())


def test_random_state_of_dropout_is_restored(data, tmp_path):
    runs = []
    for stop in (False, True):
        run = trainer(data, RECIPE.override(epochs=2))
        run.model.c1.register_forward_hook(lambda m, i, o: torch.nn.functional.dropout(o, 0.2))
        if stop:
            run.recipe = RECIPE.override(epochs=1, schedule="constant")
            run.fit(tmp_path)
            torch.manual_seed(1)
            after = trainer(data, RECIPE.override(epochs=2, schedule="constant"))
            after.model.c1.register_forward_hook(lambda m, i, o: torch.nn.functional.dropout(o, 0.2))
            after.restore(load_checkpoint(tmp_path))
            run = after
        else:
            run.recipe = RECIPE.override(epochs=2, schedule="constant")
        run.fit()
        runs.append(run.state())
    assert_same(*runs)


def test_loss_falls_and_another_seed_differs(data, unbroken):
    losses = [row["train_loss"] for row in unbroken["history"]]
    assert losses[2] < 0.85 * losses[0]
    other = trainer(data, seed=6)
    assert not torch.equal(other.model.c5.weight, trainer(data).model.c5.weight)


@pytest.mark.slow
def test_lenet5_reads_handwriting():
    result = Trainer(load_recipe("lenet5").override(epochs=6), load_data("digits"), seed=1).fit()
    assert result.accuracy > 0.93


def test_modern_form_and_both_losses_train(data):
    for model, loss in (("lenet5", "euclidean"), ("lenet5_modern", "cross_entropy")):
        recipe = load_recipe(model).override(epochs=3, batch_size=16, loss=loss)
        run = trainer(data, recipe)
        run.fit()
        assert run.history[-1]["train_loss"] < 0.9 * run.history[0]["train_loss"]


def test_letters_are_drawn_where_the_classes_are_letters(data):
    letters = Data("letters", data.train, data.test, list("ABCDEFGHIJ"), data.shape)
    assert trainer(letters).model.rbf.classes == "ABCDEFGHIJ"


def test_log_is_written(data, tmp_path):
    trainer(data, RECIPE.override(epochs=2)).fit(tmp_path)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,learning_rate,train_loss,train_accuracy,test_accuracy" and len(lines) == 3


# ---- Checkpoints


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(data, RECIPE.override(epochs=1)).fit(folder)
    return folder


def test_checkpoint_needs_no_code_to_read(saved, data):
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    assert state["model"] == "lenet5" and state["epoch"] == 1
    for source in (saved, saved / "checkpoint.pt", saved / "weights.safetensors"):
        model = restore_model(load_checkpoint(source))
        out = [evaluate(m, data.test).scores for m in (model, restore_model(state))]
        assert torch.equal(*out)


def test_weights_alone_cannot_be_resumed(saved, data):
    with pytest.raises(CheckpointError, match="weights alone"):
        trainer(data).restore(load_checkpoint(saved / "weights.safetensors"))


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.99])
def test_truncated_checkpoint_is_named(saved, tmp_path, name, keep):
    whole = (saved / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(CheckpointError, match=f"{name}: truncated or corrupt checkpoint"):
        load_checkpoint(tmp_path / name)


def test_flipped_bits_are_found(saved, tmp_path):
    path = saved / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 1000] ^= 0x40
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupt checkpoint"):
        load_checkpoint(tmp_path)


def test_foreign_files_are_named(tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: not a cuda_cnn checkpoint \(lacks format, model"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a cuda_cnn checkpoint"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path)


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "was_run").exists()


def test_weights_of_another_network_are_named(saved):
    state = load_checkpoint(saved)
    with pytest.raises(CheckpointError, match="weights do not fit lenet5_modern"):
        restore_model({**state, "model": "lenet5_modern", "model_args": {}})
    with pytest.raises(ValueError, match="unknown model 'lenet55': did you mean 'lenet5'"):
        restore_model({**state, "model": "lenet55"})
    with pytest.raises(CheckpointError, match="format 99"):
        save_and_load({**state, "format": 99}, saved.parent / "future")


def save_and_load(state, folder):
    save_checkpoint(folder, state)
    return load_checkpoint(folder)


def test_a_full_disk_leaves_the_earlier_checkpoint(saved, data, monkeypatch):
    before = (saved / "checkpoint.pt").read_bytes()
    run = trainer(data)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.pt: cannot be written .*No space left.*earlier one is untouched"
    ):
        run._save(saved)
    assert (saved / "checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["checkpoint.pt", "log.csv", "weights.safetensors"]


FILL = """
import resource, signal, sys
from cuda_cnn.train.checkpoint import load_checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = load_checkpoint(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_checkpoint(sys.argv[1], state)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_a_file_that_cannot_grow_leaves_the_earlier_checkpoint(saved):
    before = (saved / "checkpoint.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(saved)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("CheckpointError") and "cannot be written" in done.stdout, done
    assert (saved / "checkpoint.pt").read_bytes() == before
    assert not list(saved.glob(".*tmp"))


def test_a_crash_while_writing_leaves_no_half_file(tmp_path):
    (tmp_path / "x").write_bytes(b"before")

    def crash(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", crash)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"before"


def test_a_folder_that_is_a_file_is_named(tmp_path, data):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        trainer(data)._save(tmp_path / "run")


# ---- What else can go wrong


def test_nan_names_the_layer(data):
    run = trainer(data)
    with torch.no_grad():
        run.model.c5.weight[3, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"became nan in epoch 1, step 1: .*layer 'c5' \(Conv2d\), in its weight"
    ):
        run.fit()


def test_overflow_names_the_layer():
    model = create_model("lenet5_modern")
    with torch.no_grad():
        model.c3.weight.fill_(3e38)
    assert "layer 'c3' (Conv2d), in its output" in first_non_finite(model, torch.ones(1, 1, 32, 32))
    assert first_non_finite(model, torch.full((1, 1, 32, 32), float("inf"))) == "the input pictures"
    assert first_non_finite(create_model("lenet5"), torch.ones(1, 1, 32, 32)).startswith("the loss itself")


def test_diverging_run_stops(data):
    with pytest.raises(NonFiniteError, match="smaller learning rate than"):
        trainer(data, load_recipe("lenet5_modern").override(optimizer="sgd", lr=1e20)).fit()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs of at least 1, got 0"),
        ({"batch_size": -3}, "batch_size of at least 1, got -3"),
        ({"lr": 0.0}, "lr above 0"),
        ({"lr": float("nan")}, "lr above 0"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg': did you mean 'sgd'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"loss": "mpa"}, "unknown loss 'mpa'"),
        ({"loss": "cross_entropy"}, "does not suit lenet5, which gives penalties"),
        ({"model": "lenet5_modern"}, "loss 'map' does not suit lenet5_modern, which gives scores"),
        ({"model": "lent5"}, "unknown model 'lent5': did you mean 'lenet5'"),
    ],
)
def test_bad_recipes_are_named(data, fields, message):
    with pytest.raises(ValueError, match=message):
        trainer(data, RECIPE.override(**fields))


def test_bad_recipe_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'lenet': did you mean 'lenet5'"):
        load_recipe("lenet")
    path = tmp_path / "mine.json"
    for text, message in (
        ("{", "not a recipe"),
        ('{"epochs": 2}', "not a recipe"),
        ('{"modle": "x"}', "field 'modle'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(str(path))


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_are_whole(name):
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert create_model(recipe.model, **recipe.model_args) and recipe.note


def test_checkpoint_of_other_classes_is_named(saved, data):
    other = Data("x", data.train, data.test, list("ABCDEFGHIJ"), data.shape)
    with pytest.raises(CheckpointError, match="the checkpoint has classes"):
        trainer(other).restore(load_checkpoint(saved))


def test_evaluation_counts():
    said = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [5, 0, 0]])
    result = Evaluation(said, torch.tensor([0, 2, 2, 1]))
    assert result.accuracy == 0.5
    assert result.confusion().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_scores_are_larger_for_the_better():
    penalties = torch.tensor([[3.0, 1.0]])
    assert scores(create_model("lenet5"), penalties).argmax(1).item() == 1
    assert scores(create_model("lenet5_modern"), penalties).argmax(1).item() == 0


def test_other_datasets_go_through_the_loader(data):
    pairs = [(image, int(label)) for image, label in zip(data.test.images, data.test.labels)]
    model = create_model("lenet5")
    one, other = evaluate(model, pairs, batch_size=16), evaluate(model, data.test, batch_size=16)
    assert torch.equal(one.scores, other.scores) and torch.equal(one.labels, other.labels)
