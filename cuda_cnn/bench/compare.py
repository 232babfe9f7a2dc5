"""A run beside an earlier one: what has become slower, what faster. The gate of `--compare OLD --fail 5%`."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Results, key
from .settings import UnequalError

__all__ = ["Change", "changes", "parse_percent", "verdicts"]

# What must be equal for two times to be comparable at all. Versions and commits may differ: that is the question.
SAME = ("machine", "device", "threads", "instruction_set", "tf32")


@dataclass(frozen=True)
class Change:
    """One implementation of one row. slowdown: new median over old, less one."""

    row: dict
    implementation: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]
    limit: float

    @property
    def slowdown(self) -> float:
        return self.new[0] / self.old[0] - 1

    @property
    def verdict(self) -> str:
        """slower or faster: by more than the limit, and with quartiles that do not overlap; unsure: they do."""
        if abs(self.slowdown) <= self.limit:
            return "same"
        apart = self.new[1] > self.old[2] if self.slowdown > 0 else self.new[2] < self.old[1]
        if not apart:
            return "unsure"
        return "slower" if self.slowdown > 0 else "faster"

    def __str__(self) -> str:
        row = self.row
        name = f"{row['network']}/{row['layer']} {row['words']}"
        return f"{100 * self.slowdown:+.1f} %  {self.implementation}  {name} {row['pass']} {row['dtype']}"


def changes(old: Results, new: Results, limit: float) -> list[Change]:
    """Of cuda_cnn's implementations, in the rows that both runs have.

    Raises UnequalError for runs of other machines or settings, ValueError where there is nothing in common.
    """
    for name in SAME:
        before, after = old.header.get(name), new.header.get(name)
        if before != after:
            raise UnequalError(
                f"the runs differ in {name}: {before!r} before, {after!r} now; times cannot be compared"
            )
    before = {key(row): row for row in old.rows()}
    found = [
        Change(row, name, tuple(then["seconds"]), tuple(now["seconds"]), limit)
        for row in new.rows()
        for name, now in row["times"].items()
        if name.startswith("cuda_cnn") and (then := before.get(key(row), {"times": {}})["times"].get(name))
    ]
    if not found:
        raise ValueError(
            "the runs have no row in common: layers, passes, dtypes, batches and timings must be the same"
        )
    return found


def verdicts(found: list[Change]) -> str:
    """The changes in words: those that fail, the gains, and how many are neither."""
    by = {name: [c for c in found if c.verdict == name] for name in ("slower", "faster", "unsure", "same")}
    lines = [", ".join(f"{len(members)} {name}" for name, members in by.items())]
    for name in ("slower", "unsure", "faster"):
        members = sorted(by[name], key=lambda c: -abs(c.slowdown))
        lines += [f"  {name}  {change}" for change in members[:20]]
    return "\n".join(lines)


def parse_percent(text: str) -> float:
    """ "5%" or "5": 0.05. Raises ValueError for anything else than a percentage of 0 or more."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--fail: expected a percentage such as 5%, got {text!r}")
    return value / 100
