"""Reproducing the papers' claims: what is compared, what counts as seen, what is said and drawn."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cuda_cnn import cli
from cuda_cnn.models.registry import builder_parameters
from cuda_cnn.train.claims import CLAIMS, Outcome, Run, reproduce, smaller
from cuda_cnn.train.commands import reproduce as command
from cuda_cnn.train.data import Data, ImageSet


def some_data(n: int = 20) -> Data:
    generator = torch.Generator().manual_seed(0)
    pictures = ImageSet(torch.rand(n, 1, 32, 32, generator=generator), torch.arange(n) % 10)
    return Data("digits", pictures, pictures, list("0123456789"), (1, 32, 32))


def run_of(losses: list[float], accuracies: list[float]) -> Run:
    rows = [
        {"epoch": i + 1, "train_loss": loss, "train_accuracy": accuracy, "test_accuracy": accuracy}
        for i, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
    ]
    return Run(10, rows, None)


def test_measures_of_a_run():
    run = run_of([1.0, 0.5, 0.2], [0.5, 0.8, 0.95])
    assert run.loss() == 0.2
    assert run.test_error() == pytest.approx(0.05)
    assert run.epochs_to_error(0.5) == pytest.approx(1.0)
    assert run.epochs_to_error(0.35) == pytest.approx(1.5)
    assert run.epochs_to_error(0.01) == 3.0


@pytest.mark.parametrize(
    ("name", "means", "seen"),
    [
        ("relu", {"tanh": 6.0, "ReLU": 3.0}, True),
        ("relu", {"tanh": 5.0, "ReLU": 3.0}, False),
        ("lrn", {"without LRN": 0.03, "with LRN": 0.02}, True),
        ("lrn", {"without LRN": 0.02, "with LRN": 0.02}, False),
        ("batchnorm", {"without": 0.9, "with batch-norm": 0.05}, True),
        ("batchnorm", {"without": 0.06, "with batch-norm": 0.05}, False),
        ("drawing", {"lenet5": 0.9}, True),
        ("drawing", {"lenet5": 0.6}, False),
    ],
)
def test_what_counts_as_seen(name, means, seen):
    assert CLAIMS[name].seen({form: [mean] for form, mean in means.items()}) is seen


def test_a_difference_within_the_seeds_spread_is_not_seen():
    seen = CLAIMS["lrn"].seen
    assert seen({"without LRN": [0.03, 0.031, 0.032], "with LRN": [0.02, 0.021, 0.022]})
    assert not seen({"without LRN": [0.03, 0.01, 0.05], "with LRN": [0.02, 0.05, 0.018]})


@pytest.mark.parametrize(
    ("losses", "seen"),
    [((0.1, 0.5, 0.1, 0.1), True), ((0.5, 0.1, 0.1, 0.1), False), ((0.1, 0.5, 0.1, 0.5), False)],
)
def test_degradation_needs_both_halves(losses, seen):
    claim = CLAIMS["degradation"]
    assert claim.seen({form: [loss] for form, loss in zip(claim.forms, losses, strict=True)}) is seen


@pytest.mark.parametrize("name", CLAIMS)
def test_forms_are_built_from_options_of_their_network(name):
    claim = CLAIMS[name]
    for form in claim.forms.values():
        accepted = builder_parameters(form.get("model", claim.recipe.model))
        assert "kwargs" in accepted or set(form) - {"model"} <= set(accepted)
    assert claim.seen({form: [1.0, 1.0] for form in claim.forms}) in (True, False)


def test_reproduce_trains_every_form_with_every_seed(tmp_path):
    claim = CLAIMS["lrn"]
    said = []
    outcome = reproduce(claim, some_data(), seeds=2, epochs=1, progress=said.append)
    assert said == [f"{form}, seed {seed}" for form in claim.forms for seed in (0, 1)]
    assert [len(runs) for runs in outcome.runs.values()] == [2, 2]
    again = reproduce(claim, some_data(), seeds=1, epochs=1)
    for form, runs in again.runs.items():
        assert runs[0].history == outcome.runs[form][0].history
    assert {form: len(values) for form, values in outcome.measures().items()} == dict.fromkeys(claim.forms, 2)
    assert outcome.draw(tmp_path / "figure.png").stat().st_size > 10_000


def test_a_run_that_blows_up_has_not_learned():
    claim = CLAIMS["lrn"]
    claim = dataclasses.replace(claim, recipe=dataclasses.replace(claim.recipe, lr=1e38))
    outcome = reproduce(claim, some_data(), seeds=1, epochs=3)
    for (run,) in outcome.runs.values():
        assert [row["epoch"] for row in run.history] == [1, 2, 3]
        assert run.loss() == float("inf")
        assert run.test_error() == pytest.approx(0.9)


def test_each_form_has_its_best_learning_rate():
    claim = dataclasses.replace(CLAIMS["relu"], measure=Run.loss, learning_rates=(1e-6, 1e-2))
    outcome = reproduce(claim, some_data(), seeds=1, epochs=2)
    assert [runs[0].trainer.recipe.lr for runs in outcome.runs.values()] == [1e-2, 1e-2]
    assert "best learning rate 0.01" in outcome.lines()[1]


def test_drawing_measures_f6():
    outcome = reproduce(CLAIMS["drawing"], some_data(), seeds=1, epochs=1)
    assert 0 < outcome.measures()["lenet5"][0] < 1


def test_smaller_pictures():
    data = smaller(some_data(), 16)
    assert data.shape == (1, 16, 16)
    assert data.train.images.shape[-1] == 16
    with pytest.raises(ValueError, match="held in memory"):
        smaller(dataclasses.replace(some_data(), train=[], test=[]), 16)


def test_command(monkeypatch, capsys, tmp_path):
    def pretend(claim, data, seeds, epochs, progress):
        error = {"without LRN": 0.9, "with LRN": 0.95}
        return Outcome(claim, {form: [run_of([1.0], [error[form]])] * seeds for form in claim.forms})

    monkeypatch.setattr(command, "load_data", lambda spec: SimpleNamespace(name=spec))
    monkeypatch.setattr(command, "reproduce", pretend)
    assert cli.main(["reproduce", "lrn", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\n  seen\n" in out
    assert "(0.05, 0.05, 0.05)" in out
    assert (tmp_path / "lrn.png").is_file()


def test_wrong_command(capsys):
    assert cli.main(["reproduce", "relus"]) == 2
    assert "unknown claim 'relus': did you mean 'relu'?" in capsys.readouterr().err
    assert cli.main(["reproduce", "relu", "--seeds", "0"]) == 2
    assert "expected --seeds of at least 1" in capsys.readouterr().err
