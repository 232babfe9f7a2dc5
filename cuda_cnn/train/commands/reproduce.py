"""`cuda-cnn reproduce CLAIM`: a paper's claim run again at small scale, with several seeds and a figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...models.registry import nearest
from ..claims import CLAIMS, reproduce
from ..data import load_data


def add_parser(subparsers) -> None:
    names = "\n".join(f"  {name:12} {claim.text} ({claim.paper})" for name, claim in CLAIMS.items())
    parser = subparsers.add_parser(
        "reproduce",
        help="a paper's claim at small scale",
        description=f"{__doc__}\n\nclaims:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claim", metavar="CLAIM", help="one of the claims, or all")
    parser.add_argument("--data", default="digits", help="data set (default: digits)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: the claim's")
    parser.add_argument("--out", default="out/claims", help="folder of the figures")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """0 where every claim was seen, else 1."""
    if args.claim != "all" and args.claim not in CLAIMS:
        raise ValueError(f"unknown claim {args.claim!r}{nearest(args.claim, CLAIMS)}")
    if args.seeds < 1:
        raise ValueError(f"expected --seeds of at least 1, got {args.seeds}")
    data = load_data(args.data)
    seen = []
    for name in CLAIMS if args.claim == "all" else [args.claim]:
        outcome = reproduce(CLAIMS[name], data, args.seeds, args.epochs, _say)
        print("\n".join(outcome.lines()))
        seen.append(outcome.seen)
        try:
            print(f"  figure: {outcome.draw(Path(args.out) / f'{name}.png')}")
        except ImportError:
            print("  no figure: it needs matplotlib (pip install 'cuda-cnn[train]')")
    return 0 if all(seen) else 1


def _say(what: str) -> None:
    print(f"  training: {what}", file=sys.stderr)
