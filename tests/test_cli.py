"""The command line, from outside: what is printed, what is written, and the exit status."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from cuda_cnn import cli
from cuda_cnn.train.checkpoint import load_checkpoint
from cuda_cnn.train.data import BACKGROUND, INK, load_data

pytest.importorskip("sklearn", reason="the bundled digits need scikit-learn")
pytest.importorskip("matplotlib", reason="pictures need matplotlib")
Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

QUICK = ["--epochs", "1", "--batch-size", "64", "--seed", "3", "--no-report", "--quiet"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tests run side by side, and start programs: two threads each would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory):
    """Three epochs of LeNet-5: enough to read most digits."""
    out = tmp_path_factory.mktemp("runs") / "lenet5"
    assert (
        cli.main(
            ["train", "--epochs", "3", "--batch-size", "16", "--no-report", "--quiet", "--out", str(out)]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """Ten test digits as picture files, dark on light."""
    folder = tmp_path_factory.mktemp("digits")
    test = load_data("digits").test
    files = []
    for i in range(10):
        level = (test.images[i, 0] - BACKGROUND) / (INK - BACKGROUND)
        grey = (255 * (1 - level)).round().clamp(0, 255).to(torch.uint8)
        files.append(folder / f"{i}_is_{test.labels[i]}.png")
        Image.fromarray(grey.numpy()).resize((90, 90)).save(files[-1])
    return files


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0 and f"cuda-cnn {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["train", "--model", "lenet6", "--out", "OUT"], "unknown model 'lenet6': did you mean 'lenet5'"),
        (["train", "--recipe", "lenet", "--out", "OUT"], "unknown recipe 'lenet': did you mean 'lenet5'"),
        (["train", "--data", "digitz", "--out", "OUT"], "unknown data set 'digitz': did you mean 'digits'"),
        (["train", "--data", "mnist:/nowhere", "--out", "OUT"], "/nowhere is not a folder"),
        (["train", "--device", "gpu", "--out", "OUT"], "'gpu' is no device"),
        (["train", "--threads", "-1", "--out", "OUT"], "threads of at least 0"),
        (["train", "--epochs", "0", "--out", "OUT"], "epochs of at least 1"),
        (["train", "--loss", "cross_entropy", "--out", "OUT"], "does not suit lenet5"),
        (["train", "--resume", "OUT"], "no such checkpoint"),
        (["evaluate", "--checkpoint", "OUT"], "no such checkpoint"),
        (["predict", "--checkpoint", "OUT", "x.png"], "no such checkpoint"),
    ],
)
def test_wrong_input_is_named(capsys, tmp_path, argv, message):
    out = str(tmp_path / "run")
    status, _, err = run(capsys, *[out if a == "OUT" else a for a in argv])
    assert status == 2 and message in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten(capsys, trained):
    before = (trained / "checkpoint.pt").read_bytes()
    status, _, err = run(capsys, "train", *QUICK, "--out", str(trained))
    assert status == 2 and "already holds a run: --resume continues it" in err
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_resume_equals_one_run(capsys, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*QUICK, "--schedule", "constant"]
    assert run(capsys, "train", *options, "--epochs", "2", "--out", str(one))[0] == 0
    assert run(capsys, "train", *options, "--out", str(two))[0] == 0
    assert (
        run(capsys, "train", "--resume", "--epochs", "2", "--no-report", "--quiet", "--out", str(two))[0] == 0
    )
    weights = [load_checkpoint(folder)["weights"] for folder in (one, two)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resume_with_another_recipe_is_refused(capsys, trained):
    status, _, err = run(capsys, "train", "--resume", str(trained), "--lr", "0.5")
    assert status == 2 and "trained with lr 0.005: it cannot go on with 0.5" in err
    status, _, err = run(capsys, "train", "--resume", str(trained / "weights.safetensors"))
    assert status == 2 and "weights alone" in err
    status, _, err = run(capsys, "train", "--resume", str(trained), "--data", "mnist:elsewhere")
    assert status == 2 and "trained with data digits: it cannot go on with mnist:elsewhere" in err


def test_train_says_how_well(capsys, tmp_path):
    status, out, _ = run(
        capsys, "train", *QUICK[:-1], "--model", "lenet5_modern", "--out", str(tmp_path / "m")
    )
    assert status == 0 and "lenet5_modern: 61,706 parameters on" in out
    assert "epoch   1/1" in out and "test accuracy" in out and "of 364)" in out


def test_evaluate(capsys, trained):
    status, out, _ = run(capsys, "evaluate", "--checkpoint", str(trained))
    assert status == 0
    accuracy = float(out.split("digits: ")[1].split("%")[0])
    assert accuracy > 80 and "taken for" in out
    assert run(capsys, "evaluate", "--checkpoint", str(trained / "weights.safetensors"))[1] == out


def test_predict_reads_pictures_and_shows_f6(capsys, trained, digit_files):
    status, out, _ = run(capsys, "predict", "--checkpoint", str(trained), *map(str, digit_files))
    answers = [line for line in out.splitlines() if ".png: " in line]
    right = sum(line.split("_is_")[1][0] == line[-1] for line in answers)
    assert status == 0 and len(answers) == 10 and right >= 8
    assert out.count("F6 draws    target") == 10 and out.count("penalty") == 30
    first = out.splitlines()
    start = first.index("  F6 draws    target") + 1
    target = [line[14:21] for line in first[start : start + 12]]
    assert set("".join(target)) == {"#", " "}


def test_predict_names_a_broken_picture_and_reads_the_others(capsys, trained, digit_files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(digit_files[0].read_bytes()[:80])
    status, out, _ = run(
        capsys, "predict", "--checkpoint", str(trained), str(broken), str(digit_files[1]), "gone.png"
    )
    assert status == 2 and "broken.png: not a readable picture" in out and "gone.png: no such picture" in out
    assert f"{digit_files[1]}: " in out


def test_corrupt_checkpoint_is_named(capsys, trained, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:5000])
    status, _, err = run(capsys, "evaluate", "--checkpoint", str(tmp_path))
    assert status == 2 and "truncated or corrupt checkpoint" in err


def test_demo_without_timing(capsys, tmp_path):
    status, out, _ = run(capsys, "demo", "--epochs", "1", "--no-timing", "--out", str(tmp_path))
    assert status == 0 and "F6 draws" in out and "Try next" in out
    for name in ("curves", "confusion", "c1_filters", "feature_maps", "f6_drawings"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 200 and len(set(picture.convert("L").tobytes())) > 5
    assert (tmp_path / "lenet5" / "checkpoint.pt").exists()


def test_a_stopped_run_is_saved_and_goes_on(capsys, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cuda_cnn", "train", "--epochs", "400", "--no-report", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "saved. Continue with: cuda-cnn train --resume" in printed, printed
    epoch = load_checkpoint(out)["epoch"]
    assert 1 <= epoch < 400
    status, printed, _ = run(capsys, "train", "--resume", str(out), "--no-report", "--epochs", str(epoch + 1))
    assert status == 0 and f"epoch {epoch + 1:3d}/{epoch + 1}" in printed


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "cuda_cnn", "trian"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "did you mean 'train'" in done.stderr
