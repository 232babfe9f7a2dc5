"""Rows as a table, as a summary, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from .roofline import Roofline
from .stats import geometric_mean
from .work import Work

__all__ = ["COLUMNS", "cells", "csv_text", "plain", "rates", "summary", "table"]

COLUMNS = (
    *("layer", "shape", "pass", "time", "GFLOP/s", "GB/s", "% roof", "× rival (95 % of the median)"),
    *("memory", "error", "algorithm"),
)
_CSV = (
    *(
        "network",
        "layer",
        "op",
        "input",
        "what",
        "count",
        "pass",
        "dtype",
        "layout",
        "batch",
        "timing",
        "threads",
    ),
    *("flops", "bytes", "implementation", "seconds", "seconds_low", "seconds_high", "rounds", "ratio"),
    *(
        "ratio_low",
        "ratio_high",
        "ratio_least",
        "ratio_most",
        "error",
        "memory",
        "algorithm",
        "kernels",
        "notes",
    ),
)


def rates(row: dict, seconds: float, roofs: dict[str, dict]) -> tuple[float, float, float | None]:
    """FLOP/s, byte/s, and the least possible time over this one."""
    roof = roofs.get(row["dtype"])
    of_roof = Roofline(**roof).seconds(Work(row["flops"], row["bytes"])) / seconds if roof else None
    return row["flops"] / seconds, row["bytes"] / seconds, of_roof


def cells(row: dict, roofs: dict[str, dict]) -> tuple[str, ...]:
    """One line of the table: our time (the first implementation's) and each rival's ratio."""
    name = f"{row['network']}/{row['layer']}"
    extent = f"{'×'.join(map(str, row['shape']))} {row['words']}".strip()
    what = row["pass"] + ("" if row["dtype"] == "float32" else f" {row['dtype']}")
    what += "" if row["layout"] == "channels_last" else " NCHW"
    what += "" if row["timing"] in ("e2e",) else f" {row['timing']}"
    trouble = [f"{k}: WRONG, not timed" for k in row["wrong"]] + [f"{k}: none" for k in row["absent"]]
    if not row["times"]:
        return (name, extent, what, *[""] * 4, "; ".join(trouble), "", "", "")
    ours = next(iter(row["times"].values()))
    flops, moved, of_roof = rates(row, ours["seconds"][0], roofs)
    against = [f"{k} {r[0]:.2f} ({r[3]:.2f}–{r[4]:.2f})" for k, r in row["ratios"].items()]
    notes = [f"{k}: {n}" for k, t in row["times"].items() for n in t["notes"]]
    return (
        name,
        extent,
        what,
        duration(ours["seconds"][0]),
        f"{1e-9 * flops:.0f}" if flops else "",
        f"{1e-9 * moved:.1f}",
        f"{100 * of_roof:.0f}" if of_roof else "",
        "; ".join([*against, *trouble, *notes]),
        "" if ours["memory"] is None else size(ours["memory"]),
        f"{ours['error']:.0e}",
        ours["algorithm"] or ", ".join(k[:40] for k in ours["kernels"][:2]),
    )


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def size(count: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def table(head: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    """Columns of text, with rich where it is installed and the output is a terminal."""
    head = tuple(head)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return plain(head, rows)
    console = Console()
    if not console.is_terminal:
        return plain(head, rows)
    made = Table(*head, box=None, header_style="bold")
    for row in rows:
        made.add_row(*row)
    with console.capture() as captured:
        console.print(made)
    return captured.get().rstrip("\n")


def plain(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in (head, *rows)]
    return "\n".join(lines)


# ---- In one look ------------------------------------------------------------------------------------------


def setting(row: dict) -> str:
    """What rows of one mean have in common beside operator and pass."""
    return f"{row['dtype']}{'' if row['layout'] == 'channels_last' else ' NCHW'}, batch {row['batch']}"


def groups(rows: list[dict], by: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """By these columns of the rows, or by "setting"."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(setting(row) if name == "setting" else row[name] for name in by)
        found.setdefault(key, []).append(row)
    return found


def geometric_means(rows: list[dict], by: tuple[str, ...]) -> list[tuple[tuple, str, float, float, int, int]]:
    """For each group and rival: the geometric mean of the ratios; the ratio of what the network spends in these
    layers (each as often as it occurs); layers, and those where we are slower."""
    found = []
    for group, members in groups(rows, by).items():
        rivals = list(dict.fromkeys(name for row in members for name in row["ratios"]))
        for rival in rivals:
            measured = [row for row in members if rival in row["ratios"]]
            ratios = [row["ratios"][rival][0] for row in measured]
            spent = [
                sum(row["count"] * row["times"][name]["seconds"][0] for row in measured)
                for name in (rival, next(iter(measured[0]["times"])))
            ]
            slower = sum(r < 1 for r in ratios)
            found.append((group, rival, geometric_mean(ratios), spent[0] / spent[1], len(ratios), slower))
    return found


def losses(rows: list[dict]) -> list[tuple[dict, str]]:
    """Where we are slower than a rival, the worst first."""
    found = [(row, rival) for row in rows for rival, ratio in row["ratios"].items() if ratio[0] < 1]
    return sorted(found, key=lambda pair: pair[0]["ratios"][pair[1]][0])


def summary(document: dict[str, Any], most: int = 40) -> str:
    """Geometric means, then the losses, those within the noise marked."""
    rows = document["rows"]
    if not rows:
        return ""
    head = (
        "network",
        "operator",
        "pass",
        "setting",
        "rival",
        "× geometric mean",
        "× time in all",
        "layers",
        "slower",
    )
    by = ("network", "op", "pass", "setting")
    lines = [
        (*group, rival, f"{mean:.2f}", f"{spent:.2f}", str(count), str(slower))
        for group, rival, mean, spent, count, slower in geometric_means(rows, by)
    ]
    text = [plain(head, lines)]
    lost = losses(rows)
    if lost:
        text.append(
            f"\nSlower than a rival: {len(lost)}" + (f", the worst {most}:" if len(lost) > most else ":")
        )
    for row, rival in lost[:most]:
        middle, _, _, least, above = row["ratios"][rival]
        unsure = "" if above < 1 else "  (within the noise)"
        name = f"{row['network']}/{row['layer']} {row['words']}"
        text.append(
            f"  {middle:.2f} ({least:.2f}–{above:.2f}) × {rival}  {name} {row['pass']} {setting(row)}{unsure}"
        )
    wrong = [reason for row in rows for reason in row["wrong"].values()]
    return "\n".join(text + ["", *(f"WRONG, not timed: {reason}" for reason in wrong)]).rstrip()


# ---- CSV --------------------------------------------------------------------------------------------------


def csv_text(document: dict[str, Any]) -> str:
    """A line for each row and implementation; seconds, bytes, plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for row in document["rows"]:
        same = [row[name] for name in ("network", "layer", "op")]
        same += ["x".join(map(str, row["shape"])), row["words"], row["count"]]
        same += [row[name] for name in _CSV[6:14]]
        for name, times in row["times"].items():
            ratio = row["ratios"].get(name, [""] * 5)
            writer.writerow(
                [*same, name, *times["seconds"], times["rounds"], *ratio, times["error"], times["memory"]]
                + [times["algorithm"], " ".join(times["kernels"]), "; ".join(times["notes"])]
            )
    return out.getvalue()
