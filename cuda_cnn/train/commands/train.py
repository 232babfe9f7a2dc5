"""`cuda-cnn train`: a network, a data set, a recipe; a checkpoint after every epoch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ...models.registry import builder_parameters
from ...models.vgg import VGG, init_from_shallower
from ..checkpoint import STATE_FILE, CheckpointError, load_checkpoint, restore_model
from ..data import load_data
from ..loop import Interrupted, Trainer
from ..progress import Progress
from ..recipes import Recipe, list_recipes, load_recipe
from . import device

OVERRIDES = ("epochs", "batch_size", "lr", "optimizer", "schedule", "loss", "threads")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a network", description=__doc__)
    parser.add_argument("--model", help="a network of create_model (default lenet5)")
    parser.add_argument("--recipe", help="a recipe, or a JSON file of one's own (default: the network's own)")
    parser.add_argument(
        "--data",
        help='"digits" (bundled, the default), or FOLDER behind mnist:, cifar10:, cifar100: or imagefolder:',
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--optimizer")
    parser.add_argument("--schedule")
    parser.add_argument("--loss", help="map, euclidean (LeNet-5's, equations 9 and 8) or cross_entropy")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start a VGG from a trained shallower one (Simonyan, section 3.1)",
    )
    parser.add_argument("--out", help="folder of the run (default out/MODEL)")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default: --out's)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start again where --out holds a run already"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU where there is one)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the recipe's)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    chosen = device(args.device)
    trainer, out = _resume(args, chosen) if args.resume is not None else _start(args, chosen)
    if not args.quiet:
        count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        sizes = f"{len(trainer.data.train)} pictures to learn from, {len(trainer.data.test)} for the test"
        print(f"{trainer.recipe.model}: {count:,} parameters on {chosen}; {trainer.data.name}: {sizes}")
    began = time.perf_counter()
    try:
        result = trainer.fit(out, Progress(silent=args.quiet))
    except Interrupted as stop:
        print(f"{stop}; saved. Continue with: cuda-cnn train --resume {out}")
        return 130
    right = int((result.scores.argmax(1) == result.labels).sum())
    print(
        f"test accuracy {result.accuracy:.2%} ({right} of {len(result.labels)}), "
        f"{time.perf_counter() - began:.1f} s"
    )
    print(f"checkpoint in {out}")
    return 0


def _start(args: argparse.Namespace, chosen) -> tuple[Trainer, Path]:
    model = args.model or (load_recipe(args.recipe).model if args.recipe else "lenet5")
    builder_parameters(model)
    recipe = _recipe(args.recipe, model).override(**{key: getattr(args, key) for key in OVERRIDES})
    out = Path(args.out or f"out/{model}")
    if (out / STATE_FILE).exists() and not args.overwrite:
        raise CheckpointError(
            f"{out} already holds a run: --resume continues it, --overwrite starts again, "
            "--out FOLDER goes elsewhere"
        )
    trainer = Trainer(recipe, load_data(args.data or "digits"), args.seed or 0, chosen)
    if args.init_from:
        shallower = restore_model(load_checkpoint(args.init_from))
        if not isinstance(trainer.model, VGG) or not isinstance(shallower, VGG):
            raise ValueError("--init-from is for VGG networks: both the one to train and the checkpoint's")
        init_from_shallower(trainer.model, shallower)
    return trainer, out


def _recipe(name: str | None, model: str) -> Recipe:
    if name is None:
        return load_recipe(model) if model in list_recipes() else Recipe(model)
    return load_recipe(name).override(model=model)


def _resume(args: argparse.Namespace, chosen) -> tuple[Trainer, Path]:
    """The run in the checkpoint; only its epochs, threads, device and folder may be changed."""
    source = Path(args.resume or args.out or f"out/{args.model or 'lenet5'}")
    state = load_checkpoint(source)
    if "recipe" not in state:
        raise CheckpointError(
            f"{source}: holds weights alone; resume from a run's folder or its {STATE_FILE}"
        )
    before = {**state["recipe"], "seed": state["seed"], "data": state["data"]}
    if args.data and args.data.partition(":")[0] == state["data"].partition(":")[0]:
        before["data"] = args.data  # the folder may have moved
    for key in ("model", "data", "seed", *OVERRIDES[1:-1]):
        asked = getattr(args, key)
        if asked is not None and asked != before[key]:
            raise CheckpointError(
                f"{source} was trained with {key} {before[key]}: it cannot go on with {asked}"
            )
    recipe = Recipe.from_dict(state["recipe"]).override(epochs=args.epochs, threads=args.threads)
    trainer = Trainer(recipe, load_data(before["data"]), state["seed"], chosen)
    trainer.restore(state)
    return trainer, Path(args.out) if args.out else source if source.is_dir() else source.parent
