"""Pictures of a run: ratios, roofline, networks by operator, memory over a step, scaling, ladders."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from . import report
from .roofline import Roofline

__all__ = ["drawings", "save"]

DOTS_PER_INCH = 110
FASTER, SLOWER, NEUTRAL = "#2a7f62", "#c0392b", "#5b7aa8"
_COLOURS = (
    *("#2a7f62", "#5b7aa8", "#d68910", "#7d3c98", "#c0392b", "#1abc9c", "#a04000", "#7f8c8d"),
    *("#f1c40f", "#34495e", "#e59866", "#85c1e9", "#bb8fce", "#b2babb"),
)
FORM_COLOURS = {"torch": "#7f8c8d", "compile": "#d68910", "cuda_cnn": "#2a7f62", "fused": "#1a5276"}


def _figure(width: float, height: float):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'cuda-cnn[bench]'") from error
    # The same numbers give the same file, with text that stays text.
    matplotlib.rcParams["svg.hashsalt"] = "cuda_cnn"
    matplotlib.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, form: str, description: str) -> bytes:
    """PNG or SVG, with a description inside and no date."""
    buffer = io.BytesIO()
    metadata = {"Description": description, **({"Date": None} if form == "svg" else {})}
    figure.savefig(buffer, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


# ---- Layers -----------------------------------------------------------------------------------------------


def ratios(rows: list[dict], title: str):
    """A bar for each layer and a panel for each pass: how many times faster than the rival, whiskers the 95 % interval
    of the median. Above the line we are faster."""
    by_pass = report.groups(rows, ("pass",))
    most = max(map(len, by_pass.values()))
    figure = _figure(min(16, max(6, 0.24 * most + 2)), 1.9 * len(by_pass) + 1.2)
    panels = figure.subplots(len(by_pass), 1, squeeze=False)[:, 0]
    for axes, ((direction,), members) in zip(panels, by_pass.items()):
        values = [next(iter(row["ratios"].values())) for row in members]
        heights = [v[0] for v in values]
        whiskers = [[max(0, v[0] - v[3]) for v in values], [max(0, v[4] - v[0]) for v in values]]
        colours = [FASTER if h >= 1 else SLOWER for h in heights]
        places = range(len(members))
        axes.bar(places, [h - 1 for h in heights], bottom=1, color=colours, width=0.8)
        axes.errorbar(places, heights, whiskers, fmt="none", ecolor="black", elinewidth=0.7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_ylabel(direction)
        axes.set_xlim(-0.7, len(members) - 0.3)
        axes.grid(axis="y", alpha=0.3)
        labels = [f"{_tail(row['layer'])} {row['words']}" for row in members] if axes is panels[-1] else []
        axes.set_xticks(list(places) if labels else [], labels, rotation=90, fontsize=5 if most > 40 else 7)
    figure.suptitle(title, fontsize=10)
    return figure


def _tail(name: str) -> str:
    """The last parts of a module's path."""
    parts = name.removeprefix("features.").replace("denseblock", "b").replace("denselayer", "l").split(".")
    return ".".join(parts[-3:])


def roofline(rows: list[dict], roofs: dict[str, dict], dtype: str):
    """FLOP/s over FLOPs a byte, for convolutions: ours, the rival's, and the machine's two limits."""
    roof = Roofline(**roofs[dtype])
    figure = _figure(7, 4.6)
    axes = figure.subplots()
    points = [row for row in rows if row["flops"] and row["dtype"] == dtype]
    names = list(dict.fromkeys(name for row in points for name in row["times"]))
    for name, marker, colour in zip(names, "ox^s", (FASTER, NEUTRAL, "#d68910", "#7d3c98")):
        of = [(row, row["times"][name]) for row in points if name in row["times"]]
        x = [row["flops"] / row["bytes"] for row, _ in of]
        y = [1e-9 * row["flops"] / times["seconds"][0] for row, times in of]
        axes.scatter(x, y, s=14, marker=marker, color=colour, alpha=0.7, label=name)
    ridge = roof.peak / roof.bandwidth
    intensities = [row["flops"] / row["bytes"] for row in points]
    line = [min(ridge / 4, min(intensities) / 1.5), ridge, max(4 * ridge, 1.5 * max(intensities))]
    axes.plot(line, [1e-9 * roof.attainable(x) for x in line], color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s")
    axes.set_title(
        f"{dtype}: copies {1e-9 * roof.bandwidth:.1f} GB/s, multiplies {1e-9 * roof.peak:.0f} GFLOP/s; "
        "Winograd may pass the roof",
        fontsize=9,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


# ---- Networks ---------------------------------------------------------------------------------------------


def networks(rows: list[dict]):
    """A bar for each form of each network: its time, stacked by kind of layer, or of operator where layers are
    compiled or fused away."""
    figure = _figure(max(6, 1.9 * len(rows) + 1.5), 4.6)
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    kinds = list(dict.fromkeys(k for row in rows for t in row["times"].values() for k in t["by_kind"]))
    palette = dict(zip(kinds, _COLOURS))
    for panel, row in zip(axes, rows):
        for place, times in enumerate(row["times"].values()):
            total = times["seconds"][0]
            shares = times["by_kind"]
            whole, bottom = sum(shares.values()), 0.0
            for kind, share in shares.items():
                height = 1e3 * total * share / whole
                panel.bar(place, height, bottom=bottom, color=palette[kind], width=0.75)
                bottom += height
        panel.set_xticks(range(len(row["times"])), list(row["times"]), rotation=90, fontsize=8)
        panel.set_title(f"{row['model']}\n{row['pass']} {row['dtype']}", fontsize=8)
        panel.tick_params(axis="y", labelsize=7)
    axes[0].set_ylabel(f"ms, batch {rows[0]['batch']}")
    handles = [_patch(palette[k], k) for k in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7)
    return figure


def _patch(colour: str, label: str):
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def memory(rows: list[dict]):
    """What a training step holds above what was there before it, over the step, in each form."""
    figure = _figure(max(6, 3.2 * len(rows)), 3.2)
    for panel, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows):
        for form, times in row["times"].items():
            seconds, held = zip(*times["curve"])
            end = seconds[-1] or 1.0
            colour = FORM_COLOURS.get(form, "black")
            percent = [100 * s / end for s in seconds]
            panel.plot(percent, [h / 2**20 for h in held], label=form, color=colour, linewidth=1)
        panel.set(xlabel="% of the step", ylabel="MiB")
        panel.set_title(f"{row['model']}, batch {row['batch']}", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


# ---- Scaling and ladders ----------------------------------------------------------------------------------


def scaling(rows: list[dict]):
    """A row of panels a layer: time over batch, threads, and the side of the picture; the dotted line grows as the
    work does."""
    by_layer = report.groups(rows, ("network", "layer"))
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = _figure(3.4 * len(sweeps), 2.4 * len(by_layer))
    grid = figure.subplots(len(by_layer), len(sweeps), squeeze=False)
    for line, ((network, layer), members) in zip(grid, by_layer.items()):
        for axes, sweep in zip(line, sweeps):
            points = [row for row in members if row["sweep"] == sweep]
            if not points:
                axes.set_visible(False)
                continue
            x = [row["value"] for row in points]
            for name, colour in zip(points[0]["times"], (FASTER, NEUTRAL, "#d68910")):
                y = [1e3 * row["times"][name]["seconds"][0] for row in points]
                axes.plot(x, y, marker="o", markersize=3, color=colour, label=name)
            ideal = [p["bytes"] / points[-1]["bytes"] for p in points]
            if sweep == "threads":
                ideal = [x[-1] / n for n in x]
            last = 1e3 * next(iter(points[-1]["times"].values()))["seconds"][0]
            axes.plot(x, [last * i for i in ideal], ":", color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms")
            axes.set_xticks(x, list(map(str, x)))
            axes.minorticks_off()
            axes.set_title(f"{network} {_tail(layer)} {points[0]['op']}", fontsize=8)
            axes.legend(fontsize=7)
    return figure


def ladder(rows: list[dict]):
    """A panel an operator: each variant's speed, the naive form is 1."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = _figure(4.6 * columns, 2.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes in list(panels)[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(figure.axes, rows):
        names = list(row["times"])
        first = row["times"][names[0]]["seconds"][0]
        gains = [first / row["times"][name]["seconds"][0] for name in names]
        colours = [NEUTRAL if name == "torch" else FASTER for name in names]
        axes.barh(range(len(names)), gains, color=colours)
        axes.set_yticks(range(len(names)), [row["labels"][name] for name in names], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        for place, gain in enumerate(gains):
            axes.text(gain, place, f" {gain:.3g}×", va="center", fontsize=6)
        axes.set_title(f"{row['op']} {row['pass']}: {row['network']} {_tail(row['layer'])}", fontsize=8)
        axes.margins(x=0.25)
    return figure


Drawing = tuple[str, Callable[[], Any]]


def _layer_drawings(document: dict) -> list[Drawing]:
    found: list[Drawing] = []
    rows = [row for row in document["rows"] if row["ratios"]]
    for (network, setting), members in report.groups(rows, ("network", "setting")).items():
        slug = setting.replace(",", "").replace(" ", "-")
        for name, chosen in (
            ("conv2d", [r for r in members if r["op"] == "conv2d"]),
            ("others", [r for r in members if r["op"] != "conv2d"]),
        ):
            if chosen:
                rival = next(iter(chosen[0]["ratios"]))
                title = f"{network}, {name}, {setting}: × {rival}"
                found.append((f"ratios-{network}-{name}-{slug}", lambda c=chosen, t=title: ratios(c, t)))
    for dtype in document["roofline"]:
        if any(row["flops"] and row["times"] and row["dtype"] == dtype for row in rows):
            found.append((f"roofline-{dtype}", lambda d=dtype: roofline(rows, document["roofline"], d)))
    return found


def drawings(document: dict) -> list[Drawing]:
    """(name, function) of each picture that the run has the numbers for."""
    found = _layer_drawings(document)
    whole = [row for row in document["networks"] if row["times"]]
    for (direction, dtype), members in report.groups(whole, ("pass", "dtype")).items():
        found.append((f"networks-{direction}-{dtype}", lambda m=members: networks(m)))
        if direction == "train":
            curves = [row for row in members if all(t["curve"] for t in row["times"].values())]
            if curves:
                found.append((f"memory-{dtype}", lambda c=curves: memory(c)))
    scaled = [row for row in document["scaling"] if row["times"]]
    if scaled:
        found.append(("scaling", lambda: scaling(scaled)))
    climbed = [row for row in document["ladder"] if row["times"]]
    if climbed:
        found.append(("ladder", lambda: ladder(climbed)))
    return found
