"""`cuda-cnn predict`: classifies picture files; shows what LeNet-5 draws on F6 for each, or any layer's maps."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.rbf import ascii_drawing
from ..checkpoint import CheckpointError, load_checkpoint, restore_model
from ..data import DataError
from ..evaluation import scores
from ..imagefolder import read_picture
from ..images import read_ink
from . import device


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("predict", help="classify picture files", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, checkpoint.pt or weights.safetensors"
    )
    parser.add_argument("--top", type=int, default=3, help="classes to list for each picture")
    parser.add_argument(
        "--maps", metavar="LAYER,LAYER,…", help="draw these layers' maps, as PICTURE_maps.png"
    )
    parser.add_argument("--out", default="out/maps", help="folder for --maps (default out/maps)")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="PNG, JPEG …; of one character each for digits"
    )
    parser.set_defaults(run=main)


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    state = load_checkpoint(args.checkpoint)
    chosen = device(args.device)
    model = restore_model(state).to(chosen).eval()
    failed = 0
    for path in args.images:
        try:
            picture = read(path, state).to(chosen)
        except DataError as error:
            print(f"error: {error}")
            failed += 1
            continue
        print("\n".join(describe(model, picture, state["classes"], path, args.top)))
        if args.maps:
            from ..pictures import feature_maps

            file = Path(args.out) / f"{Path(path).stem}_maps.png"
            print(f"  maps: {feature_maps(model, picture, args.maps.split(','), file)}")
    return 2 if failed else 0


def read(path: str, state: dict) -> Tensor:
    """(1, C, H, W), as the checkpoint's network was trained to see it."""
    channels, size, _ = state["shape"]
    levels = state.get("levels")
    if channels == 1 and not levels:
        return read_ink(path, size=size)
    if channels != 3 or not levels:
        raise CheckpointError(f"predict: no way to bring a picture to {channels} channels of {state['data']}")
    picture = read_picture(Path(path), size, *levels)[None]
    crop = state.get("recipe", {}).get("test_crop") or size
    edge = (size - crop) // 2
    return picture[..., edge : edge + crop, edge : edge + crop]


def describe(model: nn.Module, picture: Tensor, classes: list[str], title: str, top: int = 3) -> list[str]:
    """Lines of text: the best classes, and for LeNet-5 what it draws beside what it should draw."""
    output = model(picture)[0]
    share, order = scores(model, output).softmax(0).sort(descending=True)
    lines = [f"{title}: {classes[order[0]]}"]
    for probability, index in list(zip(share.tolist(), order.tolist()))[:top]:
        penalty = f"   penalty {output[index].item():8.2f}" if getattr(model, "penalties", False) else ""
        lines.append(f"  {classes[index]}  {probability:7.2%}{penalty}")
    if hasattr(model, "forward_f6"):
        lines += ["", *drawing_beside_target(model, picture, int(order[0]))]
    return lines


def drawing_beside_target(model: nn.Module, picture: Tensor, index: int) -> list[str]:
    """F6 as 7×12 characters, and beside it the bitmap of class `index`."""
    drawn = ascii_drawing(model.forward_f6(picture)[0].flatten())
    target = ascii_drawing(model.rbf.bitmaps[index])
    rows = [f"  {left}     {right}" for left, right in zip(drawn, target)]
    return ["  F6 draws    target", *rows]
