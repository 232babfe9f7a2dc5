"""`cuda-cnn bench`: layers of the networks, and whole networks, beside torch's kernels and the machine's limits."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..models.registry import list_models, nearest
from . import compare, figures, html, ladder, machine, networks, report, run, scaling
from .cases import IMPLEMENTATIONS
from .devices import TIMINGS, Device, device
from .forms import FORMS
from .progress import Progress
from .results import SECTIONS, Results, key, load, refuse_outputs, write_text
from .settings import DTYPES, LAYOUTS
from .shapes import NETWORKS, OPERATORS
from .work import PASSES

__all__ = ["add_parser", "main"]

QUICK = {"seconds": 0.1, "rounds": 5, "memory": False}
NETWORK_PASSES = ("train", "infer")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time every kernel and whole networks beside torch's and the machine's limits",
        description=__doc__,
        epilog="Lists are separated by commas. What the columns mean: docs/benchmarks.md.",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--suite", help=f"layers of these networks (default: all of {','.join(NETWORKS)})")
    what.add_argument("--op", help=f"only these operators: {','.join(OPERATORS)}")
    what.add_argument("--layer", help="only layers whose name contains one of these")
    what.add_argument("--model", help="whole networks of the zoo instead of layers")
    what.add_argument("--pass", dest="passes", help="forward,dgrad,wgrad,full; of networks infer,train")
    what.add_argument("--dtype", default="float32", help=",".join(DTYPES))
    what.add_argument("--layout", default="channels_last", help=",".join(LAYOUTS))
    what.add_argument("--batch", type=int, default=run.BATCH)
    what.add_argument(
        "--impl",
        help="cuda_cnn[:algorithm or instruction set],torch,compile,cudnn,reference; the first is ours; "
        "of networks torch,compile,cuda_cnn,fused",
    )
    what.add_argument(
        "--ladder", action="store_true", help="each operator from the naive form to the final one"
    )
    what.add_argument("--scaling", help="how time grows with batch,threads,size")
    how = parser.add_argument_group("how")
    how.add_argument("--timing", help="cold,graph,e2e (default: e2e on a CPU, cold on a GPU)")
    how.add_argument("--threads", type=int)
    how.add_argument("--device", default="auto")
    how.add_argument("--seconds", type=float, help="for each comparison (default 0.5)")
    how.add_argument("--quick", action="store_true", help="a fifth of the time, no memory; wider intervals")
    how.add_argument("--budget", type=float, metavar="SECONDS", help="stop in good order after so long")
    out = parser.add_argument_group("out")
    out.add_argument("--json", metavar="FILE")
    out.add_argument("--csv", metavar="FILE")
    out.add_argument("--html", metavar="FILE", help="one self-contained page with pictures")
    out.add_argument("--pictures", metavar="FOLDER", help="PNG and SVG")
    out.add_argument("--resume", action="store_true", help="keep what --json FILE holds, measure the rest")
    out.add_argument("--overwrite", action="store_true")
    out.add_argument("--quiet", action="store_true", help="no line for each row")
    gate = parser.add_argument_group("an earlier run")
    gate.add_argument("--compare", metavar="OLD", help="a --json of an earlier run")
    gate.add_argument(
        "--fail", default="5%", help="status 1 where ours is slower than before by more (default 5%%)"
    )
    gate.add_argument(
        "--readme", metavar="FOLDER", help="no measurement: README's table and docs/'s figures from runs"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """0; 1 for a wrong result or a slowdown; 130 when interrupted, with what was measured kept."""
    if args.readme:
        figures.write_all(Path(args.readme))
        return 0
    limit = compare.parse_percent(args.fail)
    old = load(args.compare) if args.compare else None
    refuse_outputs([args.json, args.csv, args.html], args.overwrite or args.resume)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    on = device(args.device)
    settings = settings_of(args)
    results = _results(args, on)
    print("\n".join(machine.words(results.header)))
    status = _measure(args, settings, on, results)
    _finish(args, results)
    if note := machine.busy():
        print(note)
    if old is not None:
        found = compare.changes(old, results, limit)
        print(f"\nBeside {args.compare} (commit {old.header['commit']}):\n{compare.verdicts(found)}")
        if any(change.verdict == "slower" for change in found):
            status = status or 1
    return status or int(any(row["wrong"] for row in results.rows()))


def settings_of(args: argparse.Namespace) -> run.Settings:
    if args.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {args.batch}")
    values = {
        "suites": _choice("--suite", args.suite, NETWORKS) or NETWORKS,
        "ops": _choice("--op", args.op, OPERATORS),
        "names": _list(args.layer),
        "dtypes": _choice("--dtype", args.dtype, DTYPES),
        "layouts": _choice("--layout", args.layout, LAYOUTS),
        "timings": _choice("--timing", args.timing, TIMINGS),
        "batch": args.batch,
        **(QUICK if args.quick else {}),
    }
    chosen = _choice("--pass", args.passes, (*PASSES, *NETWORK_PASSES))
    if chosen:
        values["passes"] = chosen
    if args.impl:
        known = dict.fromkeys((*IMPLEMENTATIONS, *FORMS))
        _choice("--impl", ",".join(name.split(":")[0] for name in _list(args.impl)), known)
        values["implementations"] = tuple(n for n in _list(args.impl) if n.split(":")[0] in IMPLEMENTATIONS)
        values["forms"] = tuple(n for n in _list(args.impl) if n.split(":")[0] in FORMS)
    if args.seconds is not None:
        values["seconds"] = args.seconds
    return run.Settings(**values)


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _choice(option: str, text: str | None, known) -> tuple[str, ...]:
    for name in _list(text):
        if name not in known:
            raise ValueError(f"{option}: unknown {name!r}{nearest(name, known)}")
    return _list(text)


def _results(args: argparse.Namespace, on: Device) -> Results:
    head = machine.header(on)
    path = Path(args.json) if args.json else None
    if not (args.resume and path and path.exists()):
        return Results(head, path)
    found = load(path)
    for name in (*compare.SAME, "torch", "kernels"):
        if found.header.get(name) != head.get(name):
            raise ValueError(
                f"--resume: {path} was measured with {name} {found.header.get(name)!r}, not {head[name]!r}"
            )
    if found.header["commit"] != head["commit"]:
        head["commit"] = f"{found.header['commit']} to {head['commit'].split(' to ')[-1]}"
    found.document["header"] = head
    return found


# ---- Measuring --------------------------------------------------------------------------------------------


def _steps(args: argparse.Namespace, settings: run.Settings, on: Device, results: Results, deadline: float):
    """(rows to come, the generator that measures them) of each part that was asked for."""
    wanted = set(settings.passes)
    if args.ladder:
        return ladder.steps(settings, on, results, deadline)
    if args.scaling:
        sweeps = _choice("--scaling", args.scaling, scaling.SWEEPS)
        return scaling.steps(sweeps, settings, on, results, deadline)
    if args.model or wanted & set(NETWORK_PASSES):
        models = _choice("--model", args.model, list_models()) or settings.suites
        return networks.steps(models, settings, on, results, deadline)
    known = results.keys()
    items = [item for item in run.plan(settings, on) if key(item.row(settings)) not in known]
    if not items and known:
        print("everything is measured already")
        return 0, iter(())
    if not items:
        raise ValueError("nothing to measure: no layer fits --suite, --op, --layer and --pass")
    return len(items), run.measure(settings, on, results, items, deadline)


def _measure(args: argparse.Namespace, settings: run.Settings, on: Device, results: Results) -> int:
    deadline = time.monotonic() + args.budget if args.budget else float("inf")
    total, steps = _steps(args, settings, on, results, deadline)
    before = sum(len(results.rows(section)) for section in SECTIONS)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Progress(total, args.quiet) as bar:
            for line in _lines(steps, results):
                bar.step(line)
        results.document["complete"] = True
    except KeyboardInterrupt:
        return _stopped(results, before, "interrupted", 130)
    except run.StoppedError:
        return _stopped(results, before, f"stopped after {args.budget:.0f} s", 0)
    finally:
        signal.signal(signal.SIGTERM, previous)
        results.save()
    return 0


def _lines(steps: Iterator[dict], results: Results) -> Iterator[str]:
    for row in steps:
        if "line" in row:
            yield row["line"]
        else:
            yield "  ".join(cell for cell in report.cells(row, results.document["roofline"])[:8] if cell)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _stopped(results: Results, before: int, why: str, status: int) -> int:
    results.document["complete"] = False
    kept = sum(len(results.rows(section)) for section in SECTIONS) - before
    where = f" in {results.path}; --resume continues" if results.path else ""
    print(f"{why}: {kept} rows kept{where}", file=sys.stderr)
    return status


def _finish(args: argparse.Namespace, results: Results) -> None:
    document = results.document
    roofs = document["roofline"]
    for dtype, roof in roofs.items():
        print(
            f"Limits, {dtype}: copies {1e-9 * roof['bandwidth']:.1f} GB/s, multiplies {1e-9 * roof['peak']:.0f} GFLOP/s"
        )
    if document["rows"]:
        rows = [report.cells(row, roofs) for row in document["rows"]]
        print("", report.table(report.COLUMNS, rows), "", report.summary(document), sep="\n")
    for module, section in ((networks, "networks"), (ladder, "ladder"), (scaling, "scaling")):
        if document[section]:
            print("", module.table(document[section]), sep="\n")
    if args.csv:
        write_text(Path(args.csv), report.csv_text(document))
    try:
        if args.pictures:
            figures.draw(document, Path(args.pictures))
        if args.html:
            write_text(Path(args.html), html.page(document))
    except ImportError as error:
        print(f"no pictures: {error}")
    written = [name for name in (args.json, args.csv, args.html, args.pictures) if name]
    if written:
        print(f"\nwritten: {', '.join(written)}")
