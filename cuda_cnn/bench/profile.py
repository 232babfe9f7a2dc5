"""`cuda-cnn profile MODEL`: where a step's time goes, by layer and operator, ours against torch's."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ..models.registry import create_model
from . import machine, report
from .cases import UnavailableError
from .devices import device
from .forms import build
from .layer_times import LayerTime, StepTimes, profile_step
from .networks import step_of
from .results import refuse_outputs
from .settings import DTYPES, LAYOUTS, dtype_of, precision
from .shapes import input_size

__all__ = ["add_parser", "main"]

MOST_OPERATORS = 12
FORMS = ("cuda_cnn", "torch", "fused")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "profile", help="where a network's step spends its time, by layer and operator", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--pass", dest="direction", choices=("train", "infer"), default="train")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input", type=int, metavar="SIDE", help="height and width (default: the paper's)")
    parser.add_argument("--dtype", choices=[d for d in DTYPES if d != "tf32"], default="float32")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="channels_last")
    parser.add_argument("--against", choices=FORMS[1:], default="torch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--trace", metavar="FILE", help="Chrome trace of our steps (chrome://tracing, Perfetto)"
    )
    parser.add_argument("--overwrite", action="store_true")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    for name in ("batch", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    refuse_outputs([args.trace], args.overwrite)
    on = device(args.device)
    torch.manual_seed(0)
    model = create_model(args.model).train(args.direction == "train")
    channels, side, _ = input_size(args.model)
    side = args.input or side
    model = model.to(on.torch_device, dtype_of(args.dtype), memory_format=LAYOUTS[args.layout])
    x = torch.randn(args.batch, channels, side, side, device=on.torch_device, dtype=dtype_of(args.dtype))
    x = x.contiguous(memory_format=LAYOUTS[args.layout])
    print("\n".join(machine.words(machine.header(on))))
    with precision(args.dtype), on.context():
        ours = _times(args, "cuda_cnn", model, x, Path(args.trace) if args.trace else None)
        try:
            other = _times(args, args.against, model, x)
        except UnavailableError as reason:
            print(f"{args.against}: {reason}")
            other = StepTimes()
    print(f"\n{args.model}, {args.direction}, batch {args.batch}, {args.dtype}, ms a step, profiled\n")
    print(layer_table(ours, other, args.against))
    for form, times in (("cuda_cnn", ours), (args.against, other)):
        if times.operators:
            print(f"\n{operator_table(form, times)}")
    if args.trace:
        print(f"\nwritten: {args.trace}")
    return 0


def _times(
    args: argparse.Namespace, form: str, model: nn.Module, x: torch.Tensor, trace: Path | None = None
) -> StepTimes:
    training = args.direction == "train"
    net = build(form, model, training)
    layered = None if form == "fused" else net  # hooks would undo it
    return profile_step(layered, step_of(net, x, training), args.steps, trace, x.is_cuda)


def layer_table(ours: StepTimes, other: StepTimes, name: str) -> str:
    """A line a layer and one for the whole step; × is the other form's time over ours."""
    theirs = {layer.name: layer for layer in other.layers}
    lines = [_line(layer, theirs.get(layer.name)) for layer in ours.layers]
    both = [LayerTime("whole step", "", t.total, 0.0) for t in (ours, other)]
    lines.append(_line(both[0], both[1] if other.total else None, whole=True))
    head = ("layer", "kind", "forward", "backward", "ours", name, f"× {name}")
    return report.table(head, lines)


def _line(layer: LayerTime, other: LayerTime | None, whole: bool = False) -> tuple[str, ...]:
    parts = ("", "") if whole else (_ms(layer.forward), _ms(layer.backward))
    against = ("", "") if other is None else (_ms(other.total), f"{other.total / layer.total:.2f}")
    return (layer.name, layer.kind, *parts, _ms(layer.total), *against)


def operator_table(form: str, times: StepTimes) -> str:
    """The operators that take longest by themselves."""
    shown = times.operators[:MOST_OPERATORS]
    lines = [(n, _ms(t), f"{100 * t / times.total:.0f} %", str(c)) for n, t, c in shown]
    return report.table((f"operator, {form}", "ms", "of the step", "calls"), lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"
