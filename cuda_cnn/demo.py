"""`cuda-cnn demo`: LeNet-5 learns handwriting, draws what it reads, and every kernel is timed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .bench import table
from .models.rbf import ascii_drawing
from .train import pictures
from .train.commands import device
from .train.data import BACKGROUND, INK, Data, load_data
from .train.evaluation import Evaluation
from .train.loop import Interrupted, Trainer
from .train.progress import Progress
from .train.recipes import load_recipe

__all__ = ["add_parser", "main"]

EPOCHS = 20


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo", help="train LeNet-5, draw pictures, time every operator", description=__doc__
    )
    parser.add_argument("--out", default="out", help="folder for checkpoint and pictures (default out)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-timing", action="store_true", help="leave out the table of operators")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    out = Path(args.out)
    data = load_data("digits")
    trainer = Trainer(
        load_recipe("lenet5").override(epochs=args.epochs), data, args.seed, device(args.device)
    )
    print(
        f"LeNet-5 (1998), 60,000 parameters, learns {len(data.train)} written digits in {args.epochs} epochs:"
    )
    began = time.perf_counter()
    try:
        result = trainer.fit(out / "lenet5", Progress())
    except Interrupted as stop:
        print(f"{stop}; saved. Continue with: cuda-cnn train --resume {out / 'lenet5'}")
        return 130
    seconds = time.perf_counter() - began
    print(
        f"\ntest accuracy {result.accuracy:.2%} on {len(result.labels)} unseen digits after {seconds:.0f} s\n"
    )
    print("\n".join(show_digit(trainer, data)))
    written = draw(trainer, data, result, out)
    if not args.no_timing:
        print("\nEvery operator on layers of the networks, ours beside torch's:\n")
        for line in table.rows():
            print(line, flush=True)
    print("\n".join(["", *farewell(out, written)]))
    return 0


def show_digit(trainer: Trainer, data: Data, index: int = 3) -> list[str]:
    """A test digit, what F6 draws for it and what it should draw, side by side as text."""
    model = trainer.model.eval()
    picture = pictures.first_of_class(data, index)
    with torch.no_grad():
        drawn = model.forward_f6(picture.to(trainer.device))[0].flatten().cpu()
    level = (picture[0, 0, ::2] - BACKGROUND) / (INK - BACKGROUND)
    written = ["".join(" .:+#"[i] for i in row) for row in (level.clamp(0, 1) * 4).round().int().tolist()]
    blank = [""] * 2
    columns = [
        blank + ascii_drawing(drawn) + blank,
        blank + ascii_drawing(model.rbf.bitmaps[index].cpu()) + blank,
    ]
    titles = f"{'a digit as written':32}      {'F6 draws':10}  {'the target':10}"
    return [titles, *(f"{w:32}      {d:10}  {t:10}" for w, d, t in zip(written, *columns))]


def draw(trainer: Trainer, data: Data, result: Evaluation, out: Path) -> list[Path]:
    """Writes the pictures; returns their files, or nothing (with a note) where matplotlib is missing."""
    model = trainer.model
    try:
        return [
            pictures.curves(trainer.history, out / "curves.png"),
            pictures.confusion(result, data.classes, out / "confusion.png"),
            pictures.filters(model.c1.weight, out / "c1_filters.png", "C1's six 5×5 filters"),
            pictures.feature_maps(
                model, pictures.first_of_class(data, 3), ["c1", "s2", "c3", "s4"], out / "feature_maps.png"
            ),
            pictures.f6_drawings(model, data, out / "f6_drawings.png"),
        ]
    except ImportError as error:
        print(f"no pictures: {error}")
        return []


def farewell(out: Path, written: list[Path]) -> list[str]:
    lines = [f"pictures    {', '.join(map(str, written))}"] if written else []
    return [
        *lines,
        f"checkpoint  {out / 'lenet5'}",
        "Try next:",
        f"  python -m cuda_cnn predict --checkpoint {out / 'lenet5'} YOUR_DIGIT.png",
        f"  python -m cuda_cnn evaluate --checkpoint {out / 'lenet5'}",
        "  python -m cuda_cnn train --model lenet5_modern      (ReLU, max-pooling, softmax)",
        "  python -m cuda_cnn train --data mnist:FOLDER        (MNIST's IDX files)",
        "  make test; make bench",
    ]
