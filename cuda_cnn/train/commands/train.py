"""`cuda-cnn train`: a network, a data set, a recipe; a checkpoint after every epoch.

Several processes, each with its part of every batch: `torchrun --nproc-per-node=N -m cuda_cnn train …`.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from ...models.registry import builder_parameters
from ...models.vgg import VGG, init_from_shallower
from ...models.weights import load_weights
from ..checkpoint import STATE_FILE, CheckpointError, load_checkpoint, restore_model
from ..data import load_data
from ..logs import TensorBoard
from ..loop import Interrupted, Trainer
from ..progress import Progress
from ..recipes import Recipe, list_recipes, load_recipe
from ..workers import WorkerLostError, Workers, joined
from . import device

# Fields of the recipe that an option of the same name overrides; a resumed run may change only the second ones.
FIXED = (
    *("batch_size", "lr", "optimizer", "schedule", "loss", "warm_up", "precision", "accumulate", "average"),
    *("channels_last", "sync_batch_norm"),
)
CHANGEABLE = ("epochs", "threads", "loaders", "compile")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a network", description=__doc__)
    parser.add_argument("--model", help="a network of create_model (default lenet5)")
    parser.add_argument("--recipe", help="a recipe, or a JSON file of one's own (default: the network's own)")
    parser.add_argument(
        "--data",
        help='"digits" (bundled, the default); FOLDER behind mnist:, cifar10:, cifar100: or imagefolder:; '
        "torchvision:NAME:FOLDER",
    )
    parser.add_argument(
        "--strict", action="store_true", help="a picture file that cannot be read is an error"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="weights to start from: of the same network (torchvision's files too), or of a shallower VGG "
        "(Simonyan, section 3.1)",
    )
    _add_recipe_options(parser.add_argument_group("instead of the recipe's"))
    run = parser.add_argument_group("the run")
    run.add_argument("--out", help="folder of the run (default out/MODEL)")
    run.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT", help="continue a run (default: --out's)"
    )
    run.add_argument("--overwrite", action="store_true", help="start again where --out holds a run already")
    run.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="also within an epoch")
    run.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU where there is one)"
    )
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files")
    run.add_argument("--no-report", action="store_true", help="no pictures and no HTML page at the end")
    run.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(run=main)


def _add_recipe_options(group) -> None:
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch-size", type=int, help="of each process")
    group.add_argument("--lr", type=float, help="learning rate")
    group.add_argument("--optimizer")
    group.add_argument("--schedule")
    group.add_argument(
        "--warm-up", type=float, metavar="PART", help="of the run, in which the learning rate rises"
    )
    group.add_argument("--loss", help="map, euclidean (LeNet-5's, equations 9 and 8) or cross_entropy")
    group.add_argument("--label-smoothing", type=float, metavar="PART", help="of cross_entropy")
    group.add_argument("--precision", help="float32, bfloat16 or float16 (mixed)")
    group.add_argument(
        "--accumulate", type=int, metavar="PARTS", help="cut each batch, where it does not fit"
    )
    group.add_argument(
        "--average", type=float, metavar="KEPT", help="running average of the weights, e.g. 0.999"
    )
    group.add_argument("--channels-last", action="store_true", default=None)
    group.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    group.add_argument(
        "--sync-batch-norm", action="store_true", default=None, help="statistics of all processes"
    )
    group.add_argument("--threads", type=int, help="of the CPU")
    group.add_argument("--loaders", type=int, help="processes that read picture files")


def main(args: argparse.Namespace) -> int:
    with joined(device(args.device)) as (workers, chosen):
        status = _train(args, workers, chosen)
        if workers.count > 1:
            workers.leave(status)
    return status


def _train(args: argparse.Namespace, workers: Workers, chosen) -> int:
    trainer, out = (_start if args.resume is None else _resume)(args, chosen, workers)
    first = workers.rank == 0
    if first and not args.quiet:
        _introduce(trainer)
    log = TensorBoard(out / "tensorboard", trainer.epoch) if args.tensorboard and first else nullcontext()
    began = time.perf_counter()
    again = f"cuda-cnn train --resume {out}"
    if workers.count > 1:
        again = f"torchrun --nproc-per-node={workers.count} -m cuda_cnn train --resume {out}"
    try:
        with log as row:
            result = trainer.fit(out, Progress(silent=args.quiet or not first), row, args.save_every)
        workers.part(chosen)
    except Interrupted as stop:
        workers.part(chosen)
        if first:
            print(f"{stop}; saved. Continue with: {again}")
        return 130
    except WorkerLostError as error:
        print(f"{error}. The last checkpoint is whole. Continue with: {again}", file=sys.stderr)
        return 1
    if first:
        _conclude(args, trainer, result, out, time.perf_counter() - began)
    return 0


def _introduce(trainer: Trainer) -> None:
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    sizes = f"{len(trainer.data.train)} pictures to learn from, {len(trainer.data.test)} for the test"
    print(f"{trainer.recipe.model}: {count:,} parameters on {trainer.device}; {trainer.data.name}: {sizes}")
    if trainer.workers.count > 1:
        together = trainer.workers.count * trainer.recipe.batch_size
        print(f"{trainer.workers.count} workers, {together} pictures a step")


def _conclude(args: argparse.Namespace, trainer: Trainer, result, out: Path, seconds: float) -> None:
    right = int((result.scores.argmax(1) == result.labels).sum())
    print(f"test accuracy {result.accuracy:.2%} ({right} of {len(result.labels)}), {seconds:.1f} s")
    print(f"checkpoint in {out}")
    if args.no_report:
        return
    try:
        from ..report import write_report

        print(f"report: {write_report(out, trainer, result)}")
    except ImportError as error:
        print(f"no report: {error}")


def _start(args: argparse.Namespace, chosen, workers: Workers) -> tuple[Trainer, Path]:
    model = args.model or (load_recipe(args.recipe).model if args.recipe else "lenet5")
    builder_parameters(model)
    recipe = _recipe(args.recipe, model).override(
        **{key: getattr(args, key) for key in (*FIXED, *CHANGEABLE)}
    )
    if args.label_smoothing is not None:
        recipe = recipe.override(loss_args={**recipe.loss_args, "label_smoothing": args.label_smoothing})
    out = Path(args.out or f"out/{model}")
    if (out / STATE_FILE).exists() and not args.overwrite:
        raise CheckpointError(
            f"{out} already holds a run: --resume continues it, --overwrite starts again, "
            "--out FOLDER goes elsewhere"
        )
    trainer = Trainer(recipe, load_data(args.data or "digits", args.strict), args.seed or 0, chosen, workers)
    if args.init_from:
        _init_from(trainer, args.init_from)
    return trainer, out


def _init_from(trainer: Trainer, source: str) -> None:
    model = trainer.optimise.model
    if isinstance(model, VGG) and not source.endswith((".pth", ".safetensors")):
        state = load_checkpoint(source)
        if state["model"] != trainer.recipe.model:
            init_from_shallower(model, restore_model(state))
            return
    load_weights(model, source)


def _recipe(name: str | None, model: str) -> Recipe:
    if name is None:
        return load_recipe(model) if model in list_recipes() else Recipe(model)
    return load_recipe(name).override(model=model)


def _resume(args: argparse.Namespace, chosen, workers: Workers) -> tuple[Trainer, Path]:
    """The run in the checkpoint; only CHANGEABLE fields, device and folder may be others than before."""
    source = Path(args.resume or args.out or f"out/{args.model or 'lenet5'}")
    state = load_checkpoint(source)
    if "optimizer" not in state:
        raise CheckpointError(
            f"{source}: holds weights alone; resume from a run's folder or its {STATE_FILE}"
        )
    recipe = Recipe.from_dict(state["recipe"])
    before = {**recipe.to_dict(), "seed": state["seed"], "data": state["data"]}
    before["label_smoothing"] = recipe.loss_args.get("label_smoothing", 0.0)
    if args.data and args.data.partition(":")[0] == state["data"].partition(":")[0]:
        before["data"] = args.data  # the folder may have moved
    for key in ("model", "data", "seed", "label_smoothing", *FIXED):
        asked = getattr(args, key)
        if asked is not None and asked != before[key]:
            raise CheckpointError(
                f"{source} was trained with {key} {before[key]}: it cannot go on with {asked}"
            )
    recipe = recipe.override(**{key: getattr(args, key) for key in CHANGEABLE})
    trainer = Trainer(recipe, load_data(before["data"], args.strict), state["seed"], chosen, workers)
    trainer.restore(state)
    return trainer, Path(args.out) if args.out else source if source.is_dir() else source.parent
