"""`cuda-cnn evaluate`: accuracy of a trained network, and what it takes for what."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..checkpoint import CheckpointError, load_checkpoint, restore_model
from ..crops import centre_test, dense_test, multi_scale_test, ten_crop_test, whole_test
from ..data import load_data
from ..evaluation import evaluate
from . import device

VIEWS = ("whole", "centre", "ten_crop", "dense")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("evaluate", help="accuracy on a data set", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, checkpoint.pt or weights.safetensors"
    )
    parser.add_argument("--data", help="data set (default: the one it was trained on)")
    parser.add_argument(
        "--views",
        choices=VIEWS,
        help="of each picture: all of it, its centre, ten crops (AlexNet), or densely (VGG); default: the recipe's",
    )
    parser.add_argument("--crop", type=int, help="height and width of a crop (default: the recipe's)")
    parser.add_argument("--scales", metavar="S,S,…", help="mean over pictures with these shorter sides (VGG)")
    parser.add_argument(
        "--strict", action="store_true", help="a picture file that cannot be read is an error"
    )
    parser.add_argument("--device", default="auto")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    state = load_checkpoint(args.checkpoint)
    data = load_data(args.data or state["data"], args.strict)
    if list(data.shape) != state["shape"] or list(data.classes) != state["classes"]:
        raise CheckpointError(
            f"{args.checkpoint} takes pictures {state['shape']} of {len(state['classes'])} classes; "
            f"{data.name} has {list(data.shape)} of {len(data.classes)} classes"
        )
    chosen = device(args.device)
    test = _test(args, state.get("recipe", {}).get("test_crop", 0))
    result = evaluate(restore_model(state).to(chosen), data.test, chosen, test=test)
    print(
        f"{state['model']} on {data.name}: {result.accuracy:.2%} of {len(result.labels)} test pictures right"
    )
    confusion = result.confusion().fill_diagonal_(0)
    for flat in confusion.flatten().argsort(descending=True, stable=True)[:5].tolist():
        right, taken = divmod(flat, len(data.classes))
        if count := int(confusion[right, taken]):
            print(f"  {data.classes[right]} taken for {data.classes[taken]}: {count}")
    return 0


def _test(args: argparse.Namespace, recipes_crop: int) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What turns pictures into scores; None is the network on the whole pictures."""
    crop = args.crop or recipes_crop
    views = args.views or ("centre" if crop else "whole")
    if views in ("centre", "ten_crop") and not crop:
        raise ValueError(f"--views {views} needs --crop: the recipe names no size")
    tests = {
        "whole": whole_test,
        "centre": partial(centre_test, size=crop),
        "ten_crop": partial(ten_crop_test, size=crop),
        "dense": dense_test,
    }
    if not args.scales:
        return None if views == "whole" else tests[views]
    try:
        sides = [int(side) for side in args.scales.split(",")]
    except ValueError:
        raise ValueError(f"expected --scales such as 256,384,512, got {args.scales!r}") from None
    return partial(multi_scale_test, tests[views], sides=sides)
