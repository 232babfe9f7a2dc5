"""The command line: `cuda-cnn COMMAND …`, also `python -m cuda_cnn COMMAND …`.

A command is one row of COMMANDS: its module offers `add_parser(subparsers)`, which adds the parser and ends
with `parser.set_defaults(run=main)`, where `main(args) -> int | None` does the work. Only the module of the
command that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .models.registry import nearest

COMMANDS = {
    "env": ("cuda_cnn.env", "versions, what was built and why, self-test of each operator"),
    "demo": ("cuda_cnn.demo", "train LeNet-5 on handwritten digits, draw pictures, time every operator"),
    "train": ("cuda_cnn.train.commands.train", "train a network"),
    "evaluate": ("cuda_cnn.train.commands.evaluate", "accuracy of a trained network on a data set"),
    "reproduce": ("cuda_cnn.train.commands.reproduce", "a paper's claim run again at small scale"),
    "summary": ("cuda_cnn.models.summary", "a network's layers: shapes, costs, memory, receptive fields"),
    "bench": ("cuda_cnn.bench.command", "every kernel and network beside torch's, and the machine's limits"),
    "profile": ("cuda_cnn.bench.profile", "where a network's step spends its time, by layer and operator"),
    "explain": ("cuda_cnn.explain", "what runs each layer of a network, and why"),
    "predict": ("cuda_cnn.train.commands.predict", "classify picture files with a trained network"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    named = [a for a in argv if not a.startswith("-")][:1]
    if named and named[0] not in COMMANDS:
        print(f"cuda-cnn: unknown command {named[0]!r}{nearest(named[0], COMMANDS)}", file=sys.stderr)
        return 2
    args = _parser(named).parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("cuda-cnn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"cuda-cnn {named[0]}: {error}", file=sys.stderr)
        return 2


def _parser(named: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cuda-cnn", description="Classic CNNs on hand-written kernels.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        if name in named:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser
