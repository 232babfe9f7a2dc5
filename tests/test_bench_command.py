"""`cuda-cnn bench` and `profile` from outside: what is written, kept, refused. Series are made up, not measured."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from cuda_cnn import cli, create_model
from cuda_cnn.bench import figures, forms, ladder, machine, networks, run, scaling
from cuda_cnn.bench.results import load
from cuda_cnn.bench.shapes import NETWORKS, OPERATORS, Layer, trace
from cuda_cnn.bench.work import passes

ROOT = Path(__file__).parent.parent
WINDOW = {"size": 3, "stride": 1, "padding": 1}
TINY = [
    Layer("lenet5", "c", "conv2d", (3, 8, 8), {"filters": 4, "groups": 1, "bias": True, **WINDOW}, 2),
    Layer("lenet5", "p", "max_pool2d", (4, 8, 8), {**WINDOW, "ceil_mode": False}),
]
BASE = ["bench", "--suite", "lenet5", "--seconds", "0"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two small layers, a roofline that is given, and times that are: ours 1 ms, the rival's 2 ms."""
    monkeypatch.setattr(run, "layers", lambda network=None, op=None: TINY)
    roof = run.roofline.Roofline(1e9, 1e9)
    monkeypatch.setattr(run.roofline, "measure", lambda device, dtype: roof)
    monkeypatch.setattr(machine, "busy", lambda: "")

    def series(calls, seconds=0.5, clock=None, rounds=7):
        for call in calls.values():
            with call.around():
                call.run()
        return {name: [1e-3 * (i + 1) * f for f in (0.99, 1.0, 1.01)] for i, name in enumerate(calls)}

    for module in (run, networks):
        monkeypatch.setattr(module, "interleave", series)
    return series


def bench(capsys, *options):
    status = cli.main([*BASE, *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_everything_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"new/run.{name}" for name in ("json", "csv", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    impl = "--impl=cuda_cnn,torch,cuda_cnn:gemm,reference"
    status, out, _ = bench(capsys, *options, impl, f"--pictures={tmp_path / 'p'}", "--dtype=bfloat16")
    assert status == 0
    document = load(files["json"]).document
    assert document["complete"] and len(document["rows"]) == 5
    row = document["rows"][0]
    assert row["ratios"]["torch"] == pytest.approx([2.0] * 5) and row["times"]["torch"]["seconds"][0] == 2e-3
    assert (
        row["times"]["cuda_cnn:gemm"]["algorithm"] == "gemm"
        and row["times"]["cuda_cnn"]["memory"] >= 2 * 4 * 4 * 64
    )
    assert row["flops"] == 2 * 4 * 4 * 64 * 27 and row["count"] == 2
    assert {"machine", "threads", "torch", "onednn", "commit", "clock_mhz", "date"} <= set(document["header"])
    lines = list(csv.DictReader(files["csv"].open()))
    assert len(lines) == 3 * 4 + 2 * 3  # gemm is no algorithm of a pool
    assert {line["ratio"] for line in lines if line["implementation"] == "torch"} == {"2.0"}
    page = files["html"].read_text()
    assert (
        page.count("<svg")
        == len(list((tmp_path / "p").glob("*.svg")))
        == len(list((tmp_path / "p").glob("*.png")))
    )
    assert "src=" not in page and 'href="http' not in page.replace('xlink:href="http', "")
    for words in ("× rival", "geometric mean", "copies 1.0 GB/s", "torch 2.00 (2.00–2.00)", "written:"):
        assert words in out, words


def test_losses_are_listed_the_worst_first_and_noise_is_marked(capsys, monkeypatch):
    factors = iter([0.5, 0.9, 1.5, 1.2, 1.1])

    def series(calls, *_):
        factor = next(factors)
        wide = [0.5, 1.0, 2.0, 0.6, 1.7] if factor == 0.9 else [1.0] * 5
        return {"cuda_cnn": [1.0] * 5, "torch": [factor * w for w in wide]}

    monkeypatch.setattr(run, "interleave", series)
    _, out, _ = bench(capsys)
    assert "Slower than a rival: 2:" in out
    lost = out[out.index("Slower than") :].splitlines()[1:3]
    assert lost[0].startswith("  0.50 (0.50–0.50)") and "noise" not in lost[0]
    assert lost[1].startswith("  0.90 (0.45–1.80)") and "within the noise" in lost[1]


def test_a_wrong_result_fails_the_run_and_is_not_timed(capsys, monkeypatch, tmp_path):
    from cuda_cnn.bench import rivals

    right = rivals.F.conv2d
    monkeypatch.setattr(rivals.F, "conv2d", lambda *a: right(*a) * 1.01)
    status, out, _ = bench(capsys, "--json", str(tmp_path / "a.json"))
    assert status == 1 and "WRONG, not timed" in out
    row = load(tmp_path / "a.json").rows()[0]
    assert "cuda_cnn" not in row["times"] and not row["ratios"] and "error" in row["wrong"]["cuda_cnn"]


# ---- Files ------------------------------------------------------------------------------------------------


def test_existing_files_are_refused_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "row_of", lambda *a: pytest.fail("measured"))
    for option in ("--json", "--csv", "--html"):
        path = tmp_path / "kept"
        path.write_text("mine")
        status, _, err = bench(capsys, option, str(path))
        assert status == 2 and "exists: --overwrite replaces it" in err and path.read_text() == "mine"
    status, _, err = bench(capsys, "--json", str(tmp_path), "--overwrite")
    assert status == 2 and "is a folder" in err


def test_unwritable_files_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "row_of", lambda *a: pytest.fail("measured"))
    monkeypatch.setattr("os.access", lambda *a: False)  # root may write anywhere
    status, _, err = bench(capsys, "--csv", str(tmp_path / "a.csv"))
    assert status == 2 and "cannot be written" in err
    (tmp_path / "file").touch()
    status, _, err = bench(capsys, "--json", str(tmp_path / "file/below.json"))
    assert status == 2 and "file" in err


def test_an_interrupted_run_keeps_what_was_measured_and_goes_on(capsys, tmp_path, monkeypatch):
    right, calls = run.row_of, []

    def third_is_stopped(*args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(run, "row_of", third_is_stopped)
    path = tmp_path / "run.json"
    status, out, err = bench(capsys, "--json", str(path), "--csv", str(tmp_path / "run.csv"))
    assert status == 130 and "interrupted: 2 rows kept" in err and "geometric mean" in out
    assert not load(path).document["complete"] and len(load(path).rows()) == 2
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 5
    status, _, _ = bench(capsys, "--json", str(path), "--resume")
    assert status == 0 and calls == ["forward", "dgrad", "wgrad", "wgrad", "forward", "dgrad"]
    assert load(path).document["complete"] and len(load(path).rows()) == 5
    assert not list(tmp_path.glob("*.part"))


def test_a_budget_stops_in_good_order(capsys, tmp_path, monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    path = tmp_path / "run.json"
    status, _, err = bench(capsys, "--json", str(path), "--budget", "90", "--quiet")
    assert status == 0 and "stopped after 90 s" in err and 0 < len(load(path).rows()) < 5


def test_resume_on_another_machine_is_refused(capsys, tmp_path):
    path = tmp_path / "run.json"
    bench(capsys, "--json", str(path))
    document = json.loads(path.read_text())
    document["header"]["threads"] = 99
    path.write_text(json.dumps(document))
    status, _, err = bench(capsys, "--json", str(path), "--resume")
    assert status == 2 and "was measured with threads 99" in err
    path.write_text("{}")
    status, _, err = bench(capsys, "--json", str(path), "--resume")
    assert status == 2 and "not a run of cuda-cnn bench" in err


def test_the_gate(capsys, tmp_path, monkeypatch, tiny):
    old = tmp_path / "old.json"
    bench(capsys, "--json", str(old))
    status, out, _ = bench(capsys, "--compare", str(old))
    assert status == 0 and "0 slower, 0 faster, 0 unsure, 5 same" in out

    def slower(calls, *rest):
        return {name: [1.2 * t for t in times] for name, times in tiny(calls, *rest).items()}

    monkeypatch.setattr(run, "interleave", slower)
    status, out, _ = bench(capsys, "--compare", str(old), "--fail", "5%")
    assert (
        status == 1 and "5 slower" in out and "+20.0 %  cuda_cnn  lenet5/c → 4 3×3/1 forward float32" in out
    )
    assert bench(capsys, "--compare", str(old), "--fail", "25%")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "vgg61"], "--suite: unknown 'vgg61': did you mean 'vgg16'"),
        (["--op", "conv3d"], "--op: unknown 'conv3d': did you mean 'conv2d'"),
        (["--pass", "backward"], "--pass: unknown 'backward'"),
        (["--dtype", "float8"], "--dtype: unknown 'float8'"),
        (["--dtype", "tf32"], "TensorFloat-32 is a GPU's"),
        (["--layout", "nhwc"], "--layout: unknown 'nhwc'"),
        (["--impl", "tourch"], "--impl: unknown 'tourch': did you mean 'torch'"),
        (["--impl", "torch:gemm"], "only cuda_cnn has variants"),
        (["--timing", "graph"], "CUDA graphs need --device cuda"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--fail", "lots"], "expected a percentage"),
        (["--compare", "/nowhere.json"], "No such file"),
        (["--layer", "nothing"], "nothing to measure"),
        (["--model", "resnet51"], "--model: unknown 'resnet51'"),
        (["--scaling", "depth"], "--scaling: unknown 'depth'"),
        (["--device", "tpu"], "expected auto, cpu or cuda, got 'tpu'"),
        (["--readme", "/nowhere"], "holds no runs"),
    ],
)
def test_wrong_input_is_named(capsys, options, message):
    status, _, err = bench(capsys, *options)
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    status, _, err = bench(capsys, "--device", "cuda")
    assert status == 2 and "sees no GPU" in err
    assert bench(capsys, "--impl", "cuda_cnn,cudnn")[0] == 0  # absent, said in the table


def test_without_matplotlib_a_note_and_the_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "run.json"
    status, out, _ = bench(capsys, "--json", str(path), "--html", str(tmp_path / "run.html"))
    assert status == 0 and "no pictures: pictures need matplotlib: pip install 'cuda-cnn[bench]'" in out
    assert load(path).document["complete"] and not (tmp_path / "run.html").exists()


def test_without_rich_plain_lines(capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, _ = bench(capsys)
    assert status == 0 and "[5/5, 0:00 left]" in out and "lenet5/c" in out


# ---- Networks, ladders, scaling -----------------------------------------------------------------------------


@pytest.fixture
def small_networks(monkeypatch):
    monkeypatch.setattr(networks, "input_size", lambda name: (1 if name == "lenet5" else 3, 32, 32))


def test_networks_in_every_form(capsys, tmp_path, small_networks):
    pytest.importorskip("matplotlib")
    path, pictures = tmp_path / "n.json", tmp_path / "p"
    models = ["--model", "resnet20", "--batch", "2", "--impl", "torch,cuda_cnn,fused"]
    status, out, _ = bench(capsys, *models, "--json", str(path), "--pictures", str(pictures))
    rows = load(path).rows("networks")
    assert status == 0 and [row["pass"] for row in rows] == ["infer", "train"]
    for row in rows:
        assert not row["wrong"], row["wrong"]
        ours = row["times"]["cuda_cnn"]
        assert ours["memory"] > 0 and ours["by_kind"]["convolution"] > 0 and len(ours["curve"]) > 3
    assert rows[1]["times"]["cuda_cnn"]["by_kind"]["batch_norm"] > 0
    assert rows[1]["times"]["torch"]["memory"] > rows[0]["times"]["torch"]["memory"]  # activations are kept
    assert {p.name for p in pictures.glob("*.svg")} == {
        *("networks-infer-float32.svg", "networks-train-float32.svg", "memory-float32.svg")
    }
    if "fused" in rows[0]["absent"]:
        assert "not available" in out


def test_plain_forms_hold_none_of_our_operators():
    for name, side in (("lenet5", 32), ("googlenet", 48), ("densenet121", 32)):
        model = create_model(name).eval()
        x = torch.randn(2, 1 if name == "lenet5" else 3, side, side)
        expected = forms.outputs_of(model(x))
        found = forms.outputs_of(forms.plain(model)(x))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
        with torch.autograd.profiler.profile() as seen:
            forms.plain(model)(x)
        assert not [event.name for event in seen.function_events if "cuda_cnn" in event.name], name


def test_ladder_climbs_from_the_naive_form(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ladder, "layers", lambda network, op: [layer for layer in TINY if layer.op == op])
    monkeypatch.setattr(ladder, "RUNGS", {"conv2d": ("lenet5", "c"), "max_pool2d": ("lenet5", "p")})
    path = tmp_path / "l.json"
    status, out, _ = bench(capsys, "--ladder", "--json", str(path), "--pictures", str(tmp_path / "p"))
    rows = load(path).rows("ladder")
    assert status == 0 and [row["op"] for row in rows] == ["conv2d", "max_pool2d"]
    assert [name for name in rows[0]["times"] if name not in ("cuda_cnn:avx2", "cuda_cnn:avx512")] == [
        *("cuda_cnn:reference", "reference", "cuda_cnn:baseline", "cuda_cnn:gemm", "cuda_cnn:winograd"),
        *("cuda_cnn", "torch"),
    ]
    assert "packed matrix product" in out and (tmp_path / "p/ladder.svg").exists()


def test_scaling_goes_through_batch_threads_and_size(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "layers", lambda network: TINY)
    monkeypatch.setattr(scaling, "LAYERS", (("lenet5", "c"),))
    path, threads = tmp_path / "s.json", torch.get_num_threads()
    status, _, _ = bench(
        capsys, "--scaling", "batch,size,threads", "--json", str(path), "--pictures", str(tmp_path / "p")
    )
    rows = load(path).rows("scaling")
    assert status == 0 and torch.get_num_threads() == threads
    points = {(row["sweep"], row["value"]): row for row in rows}
    assert points["batch", 16]["flops"] == 16 * points["batch", 1]["flops"]
    assert points["size", 112]["flops"] == 4 * points["size", 56]["flops"]
    assert points["threads", 1]["threads"] == 1 and (tmp_path / "p/scaling.png").exists()
    assert scaling.points("threads", 4, 6) == [1, 2, 4, 6]


def test_profile_accounts_for_the_step_and_writes_a_trace(capsys, tmp_path):
    trace = tmp_path / "t.json"
    options = ["--batch", "2", "--input", "32", "--steps", "1", "--trace", str(trace)]
    status = cli.main(["profile", "resnet20", *options])
    out = capsys.readouterr().out
    assert (
        status == 0
        and "layer1.0.conv1" in out
        and "whole step" in out
        and "cuda_cnn::conv2d_weight_grad" in out
    )
    assert "aten::convolution_backward" in out or "aten::mkldnn_convolution" in out
    assert any(
        "layer: layer1.0.conv1" in str(e.get("name")) for e in json.loads(trace.read_text())["traceEvents"]
    )
    assert cli.main(["profile", "resnet20", "--trace", str(trace)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["profile", "resnet2O"]) == 2 and "did you mean" in capsys.readouterr().err


# ---- What is committed ------------------------------------------------------------------------------------


def test_readme_and_figures_are_those_of_the_committed_runs():
    (folder,) = re.findall(
        r"^RESULTS \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    document = figures.merged(ROOT / folder)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.readme(text, document) == text, "make figures"
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / figures.FIGURES).glob("*.svg")}
    assert drawn and all(f"numbers {figures.digest(document)}" in svg for svg in drawn.values()), (
        "make figures"
    )
    page = (ROOT / "docs/measured.md").read_text(encoding="utf-8")
    assert page == figures.measured(document, sorted(drawn)), "make figures"


def test_figures_command_changes_only_what_stands_between_the_marks(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    bench(capsys, "--json", str(tmp_path / "results/a.json"))
    figures.write_all(tmp_path / "results", tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "| `conv2d` | float32, batch 4 | torch | 2.00 (0 of 1) | 2.00 (0 of 1) | 2.00 (0 of 1) |" in text
    once = (
        text,
        (tmp_path / "docs/measured.md").read_text(),
        (tmp_path / "docs/figures/roofline-float32.svg").read_text(),
    )
    figures.write_all(tmp_path / "results", tmp_path)
    assert once == (
        readme.read_text(),
        (tmp_path / "docs/measured.md").read_text(),
        (tmp_path / "docs/figures/roofline-float32.svg").read_text(),
    )
    readme.write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        figures.write_all(tmp_path / "results", tmp_path)


@pytest.mark.parametrize("op", OPERATORS)
def test_pytest_suites_are_over_the_same_layers_and_passes(op):
    """benchmarks/bench_OP.py times each of the operator's layers and passes, and has a test of that name."""
    names = runpy.run_path(str(ROOT / f"benchmarks/bench_{op}.py"))
    marks = {mark.args[0]: mark.args[1] for mark in names[f"bench_{op}"].pytestmark}
    assert list(marks["layer"]) == [layer for n in NETWORKS for layer in trace(n) if layer.op == op]
    assert tuple(marks["direction"]) == passes(op)
