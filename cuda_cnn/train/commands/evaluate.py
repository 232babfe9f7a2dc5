"""`cuda-cnn evaluate`: accuracy of a trained network, and what it takes for what."""

from __future__ import annotations

import argparse

from ..checkpoint import CheckpointError, load_checkpoint, restore_model
from ..data import load_data
from ..loop import evaluate
from . import device


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("evaluate", help="accuracy on a data set", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, checkpoint.pt or weights.safetensors"
    )
    parser.add_argument("--data", help="data set (default: the one it was trained on)")
    parser.add_argument("--device", default="auto")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    state = load_checkpoint(args.checkpoint)
    data = load_data(args.data or state["data"])
    if list(data.shape) != state["shape"] or list(data.classes) != state["classes"]:
        raise CheckpointError(
            f"{args.checkpoint} takes pictures {state['shape']} of {len(state['classes'])} classes; "
            f"{data.name} has {list(data.shape)} of {len(data.classes)}"
        )
    chosen = device(args.device)
    result = evaluate(restore_model(state).to(chosen), data.test, chosen)
    print(
        f"{state['model']} on {data.name}: {result.accuracy:.2%} of {len(result.labels)} test pictures right"
    )
    confusion = result.confusion().fill_diagonal_(0)
    for flat in confusion.flatten().argsort(descending=True, stable=True)[:5].tolist():
        right, taken = divmod(flat, len(data.classes))
        if count := int(confusion[right, taken]):
            print(f"  {data.classes[right]} taken for {data.classes[taken]}: {count}")
    return 0
