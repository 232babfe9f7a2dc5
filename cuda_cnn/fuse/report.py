"""What `fuse` has done to each layer, and what it has left alone."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    layer: str
    what: str  # the form that it has taken, or why it was left alone


@dataclass
class Report:
    """`fused` and `left`: rows of (layer, what), in the order of the network. As text: a table."""

    mode: str  # "training" or "inference"
    fused: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        width = max((len(row.layer) for row in (*self.fused, *self.left)), default=0)
        lines = [f"{self.mode}: {len(self.fused)} layers fused, {len(self.left)} left alone"]
        for title, rows in (("fused", self.fused), ("left alone", self.left)):
            lines += [f"{title}:"] * bool(rows)
            lines += [f"  {row.layer:{width}}  {row.what}" for row in rows]
        return "\n".join(lines)

    def add(self, other: "Report", prefix: str) -> None:
        for mine, theirs in ((self.fused, other.fused), (self.left, other.left)):
            mine += [Row(".".join(filter(None, (prefix, row.layer))), row.what) for row in theirs]
