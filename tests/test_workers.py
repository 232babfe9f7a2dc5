"""Several processes that train one network: the same numbers as one process, and what happens when one dies."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from cuda_cnn import cli
from cuda_cnn.nn import BatchNorm2d, SyncBatchNorm
from cuda_cnn.train.checkpoint import load_checkpoint
from cuda_cnn.train.workers import Workers, synchronise_batch_norm

ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def write_idx(path, code: int, values: torch.Tensor) -> None:
    shape = b"".join(length.to_bytes(4, "big") for length in values.shape)
    path.write_bytes(bytes([0, 0, code, values.dim()]) + shape + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """41 pictures of noise in ten classes, and a recipe with batch normalisation and nothing random."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    for stem, count in (("train", 41), ("t10k", 11)):
        pictures = torch.randint(256, (count, 28, 28), generator=generator)
        write_idx(folder / f"{stem}-images-idx3-ubyte", 8, pictures)
        write_idx(folder / f"{stem}-labels-idx1-ubyte", 8, torch.arange(count) % 10)
    recipe = {
        "model": "alexnet_cifar",
        "model_args": {"lrn": False, "batch_norm": True},
        "sync_batch_norm": True,
        "epochs": 2,
        "lr": 0.01,
        "threads": 1,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return ["--data", f"mnist:{folder}", "--recipe", str(folder / "recipe.json"), "--no-report"]


def start_torchrun(*arguments: str) -> subprocess.Popen:
    """In a process group of its own, which a Ctrl-C reaches as a terminal's would."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cuda_cnn", "train"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ALONE},
        start_new_session=True,
    )


def torchrun(*arguments: str) -> tuple[int, str, str]:
    """Its exit status, and what it said on stdout and stderr."""
    process = start_torchrun(*arguments)
    try:
        said = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, *said


def wait_for_an_epoch(folder, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((folder / "log.csv").exists() and rows(folder)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def rows(folder) -> list[dict]:
    with open(folder / "log.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_two_workers_are_one_with_the_doubled_batch(options, tmp_path):
    """Batches of 16, 16 and 9 = 5 + 4; batch normalisation over both parts of each."""
    two, one = tmp_path / "two", tmp_path / "one"
    status, said, errors = torchrun(*options, "--batch-size", "8", "--device", "cpu", "--out", str(two))
    assert status == 0, said + errors
    assert "2 workers, 16 pictures a step" in said
    assert said.count("test accuracy") == 1
    quiet = ["--quiet", "--device", "cpu"]
    assert cli.main(["train", *options, *quiet, "--batch-size", "16", "--out", str(one)]) == 0
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    states = [load_checkpoint(folder) for folder in (two, one)]
    for name, expected in states[1]["weights"].items():
        torch.testing.assert_close(states[0]["weights"][name], expected, rtol=1e-3, atol=1e-5)


def test_a_killed_worker_ends_the_run_which_resumes(options, tmp_path, capsys):
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cuda_cnn", "train", *options, "--epochs", "9999", "--out", str(out)]
    workers = [
        subprocess.Popen(
            [*command, "--batch-size", "8", "--accumulate", "2", "--device", "cpu", "--quiet"],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **ALONE,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    try:
        wait_for_an_epoch(out, workers[0])
        workers[1].send_signal(signal.SIGKILL)
        _, said = workers[0].communicate(timeout=120)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[0].returncode == 1, said
    assert "worker 0 of 2: another worker has gone, so the run ends" in said
    assert f"Continue with: torchrun --nproc-per-node=2 -m cuda_cnn train --resume {out}" in said
    epoch = load_checkpoint(out)["epoch"]
    assert epoch >= 1
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert "is of 2 worker(s), this run has 1" in capsys.readouterr().err
    status, said, errors = torchrun(
        "--resume", str(out), "--epochs", str(epoch + 1), "--device", "cpu", "--no-report"
    )
    assert status == 0, said + errors
    assert [row["epoch"] for row in rows(out)] == list(range(1, epoch + 2))


def test_ctrl_c_under_torchrun_saves(options, tmp_path):
    out = tmp_path / "run"
    more = ["--batch-size", "8", "--device", "cpu", "--epochs", "9999", "--quiet", "--out", str(out)]
    process = start_torchrun(*options, *more)
    try:
        wait_for_an_epoch(out, process)
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"saved. Continue with: torchrun --nproc-per-node=2 -m cuda_cnn train --resume {out}" in said, (
        errors
    )
    state = load_checkpoint(out)
    assert state["workers"] == 2 and state["epoch"] >= len(rows(out)) >= 1


def test_shards_are_the_parts_of_one_batch():
    order = torch.arange(41)
    both = [Workers(rank, 2).shard(order, 8) for rank in range(2)]
    assert [sizes for _, sizes in both] == [[16, 16, 9]] * 2
    assert [len(part) for part in both[1][0]] == [8, 8, 4]
    joined = [torch.cat(parts) for parts in zip(*(parts for parts, _ in both), strict=True)]
    assert torch.equal(torch.cat(joined), order)
    assert Workers(1, 3).shard(torch.arange(14), 4)[1] == [12]  # the last two are fewer than the workers


def test_alone_nothing_is_exchanged():
    ours, torchs = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    assert synchronise_batch_norm(torch.nn.Sequential(ours, torchs)) == 1
    assert type(ours) is SyncBatchNorm and type(torchs) is torch.nn.BatchNorm2d
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), torchs(x))
