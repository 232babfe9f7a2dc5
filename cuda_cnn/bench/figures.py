"""Files made from runs: pictures, README's table, docs/measured.md. `make figures` makes all of them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import ladder, machine, networks, pictures, report
from .results import SECTIONS, load, write_text

__all__ = ["digest", "draw", "measured", "merged", "readme", "write_all"]

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- speed: made by `make figures`, do not edit -->", "<!-- end of speed -->"
PASSES = {"forward": "forward", "dgrad": "input gradient", "wgrad": "weight gradient"}
FIGURES = Path("docs/figures")


def merged(folder: Path) -> dict[str, Any]:
    """All runs of one machine's folder as one document. Raises ValueError for runs of different machines."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no runs (*.json)")
    documents = [load(file).document for file in files]
    whole = {**documents[0], "complete": all(d["complete"] for d in documents), "roofline": {}}
    for name in ("machine", "threads", "instruction_set"):
        if len({d["header"][name] for d in documents}) > 1:
            raise ValueError(f"{folder}: runs with different {name} do not belong in one folder")
    for section in SECTIONS:
        whole[section] = [row for d in documents for row in d[section]]
    for d in documents:
        whole["roofline"].update(d["roofline"])
    return whole


def digest(document: dict[str, Any]) -> str:
    """Stands in every picture, so that it can be told which numbers it was made from."""
    kept = {name: document[name] for name in ("roofline", *SECTIONS)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def draw(document: dict[str, Any], folder: Path, forms: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Every picture that the run has numbers for. Raises ImportError without matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in pictures.drawings(document):
        figure = make()
        for form in forms:
            written.append(folder / f"{name}.{form}")
            written[-1].write_bytes(pictures.save(figure, form, f"numbers {digest(document)}"))
    return written


def write_all(folder: Path, root: Path = ROOT) -> list[Path]:
    """README's table, docs/measured.md, and its figures, from the runs in `folder`."""
    document = merged(folder)
    for old in (root / FIGURES).glob("*.svg"):
        old.unlink()
    written = draw(document, root / FIGURES, ("svg",))
    page = root / "README.md"
    write_text(page, readme(page.read_text(encoding="utf-8"), document))
    write_text(root / "docs/measured.md", measured(document, sorted(path.name for path in written)))
    return [page, root / "docs/measured.md", *written]


def readme(text: str, document: dict[str, Any]) -> str:
    """README with what stands between its two marks made anew. Raises ValueError where they are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md: expected the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{speed(document)}\n\n{END}{rest.split(END, 1)[1]}"


def speed(document: dict[str, Any]) -> str:
    """The tables of README, in Markdown."""
    head = document["header"]
    lines = [
        f"Measured on {head['machine']}, {head['threads']} threads, {head['instruction_set']}, torch {head['torch']} "
        f"({head['onednn']}); channels_last where nothing else is said.",
        "Times the rival's speed: above 1 this library is faster; geometric mean over the distinct layers of every",
        "network, in brackets how many of them are slower. Network by network, and every loss:",
        "[docs/measured.md](docs/measured.md).",
        *(
            []
            if document["complete"]
            else ["The run was stopped before its end: what is not listed was not measured."]
        ),
        "",
        *_speed_table(document["rows"]),
    ]
    if document["networks"]:
        lines += ["", *_network_table(document["networks"])]
    return "\n".join(lines)


def _speed_table(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["ratios"] and row["pass"] in PASSES]
    means = {
        (*group, rival): f"{mean:.2f} ({slower} of {count})"
        for group, rival, mean, _, count, slower in report.geometric_means(rows, ("op", "setting", "pass"))
    }
    lines = [
        f"| operator | setting | rival | {' | '.join(PASSES.values())} |",
        "|---|---|---|" + "---|" * len(PASSES),
    ]
    for op, setting, rival in dict.fromkeys((op, setting, rival) for op, setting, _, rival in means):
        cells = [means.get((op, setting, direction, rival), "") for direction in PASSES]
        lines.append(f"| `{op}` | {setting} | {rival} | {' | '.join(cells)} |")
    return lines


def _network_table(rows: list[dict]) -> list[str]:
    forms = [form for form in networks.FORMS if any(form in row["times"] for row in rows)]
    lines = [
        f"| network, batch {rows[0]['batch']} | "
        + " | ".join(f"{form}, peak memory" for form in forms)
        + " |",
        "|---|" + "---|" * len(forms),
    ]
    for row in rows:
        cells = []
        for form in forms:
            times, against = row["times"].get(form), row["ratios"].get(form)
            text = "" if times is None else f"{report.duration(times['seconds'][0])}"
            text += f" (**{against[0]:.2f}×**)" if against else ""
            cells.append(text + (f", {report.size(times['memory'])}" if times else ""))
        lines.append(f"| {row['model']} {row['pass']} {row['dtype']} | {' | '.join(cells)} |")
    return lines


def measured(document: dict[str, Any], names: list[str]) -> str:
    """docs/measured.md: header, means, every loss, pictures (a bar for every layer)."""
    parts = [
        "# Measured",
        "Made by `make figures` from `benchmarks/results/`; what it means: [benchmarks.md](benchmarks.md).",
    ]
    parts.append("```\n" + "\n".join(machine.words(document["header"])) + "\n```")
    for dtype, roof in document["roofline"].items():
        bandwidth, peak = 1e-9 * roof["bandwidth"], 1e-9 * roof["peak"]
        parts.append(f"Limits, {dtype}: copies {bandwidth:.1f} GB/s, multiplies {peak:.0f} GFLOP/s.")
    if document["rows"]:
        parts += ["## Means, and every layer that is slower", f"```\n{report.summary(document, 10**6)}\n```"]
    if document["networks"]:
        parts += ["## Networks", f"```\n{networks.table(document['networks'])}\n```"]
    if document["ladder"]:
        parts += ["## From the naive form to the final one", f"```\n{ladder.table(document['ladder'])}\n```"]
    parts += ["## Pictures", *(f"![{name}](figures/{name})" for name in names)]
    return "\n\n".join(parts) + "\n"
