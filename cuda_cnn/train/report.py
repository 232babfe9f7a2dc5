"""A run as one HTML page that needs no other file, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from torch import nn

from . import pictures
from .checkpoint import write_atomic
from .evaluation import Evaluation
from .loop import Trainer

__all__ = ["REPORT_FILE", "write_report"]

REPORT_FILE, PICTURES = "report.html", "pictures"
LAYERS_SHOWN = 4

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{figures}
<h2>Recipe</h2>
{recipe}
<h2>Epochs</h2>
{epochs}
</body></html>
"""


def write_report(folder: str | Path, trainer: Trainer, result: Evaluation) -> Path:
    """Draws the pictures into `folder`/pictures and writes `folder`/report.html with all of them in it.

    Raises ImportError where matplotlib is missing.
    """
    folder, data, recipe = Path(folder), trainer.data, trainer.recipe
    figures = "\n".join(
        f"<h2>{html.escape(title)}</h2>\n{_embedded(path)}"
        for title, path in draw(folder, trainer, result).items()
    )
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    page = PAGE.format(
        title=html.escape(f"{recipe.model} on {data.name}"),
        summary=html.escape(
            f"Test accuracy {result.accuracy:.2%} of {len(result.labels)} pictures after {trainer.epoch} epochs; "
            f"{len(data.train)} pictures to learn from, {len(data.classes)} classes, {count:,} parameters, "
            f"seed {trainer.seed}."
        ),
        figures=figures,
        recipe=_table([("option", "value"), *recipe.to_dict().items()]),
        epochs=_table([tuple(trainer.history[0]), *(row.values() for row in trainer.history)]),
    )
    write_atomic(folder / REPORT_FILE, lambda file: file.write(page.encode()))
    return folder / REPORT_FILE


def draw(folder: Path, trainer: Trainer, result: Evaluation) -> dict[str, Path]:
    """The pictures of a run, by title."""
    model, data, place = trainer.model.eval(), trainer.data, folder / PICTURES
    drawn = {
        "Training": pictures.curves(trainer.history, place / "curves.png"),
        "Confusion": pictures.confusion(result, data.classes, place / "confusion.png"),
        "Worst mistakes": pictures.worst(result, data, place / "worst.png"),
    }
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if convolutions:
        names = list(convolutions)
        shown = names[:: max(1, len(names) // LAYERS_SHOWN)][:LAYERS_SHOWN]
        first = convolutions[names[0]].weight[:48]
        image = data.test[0][0][None]
        if size := trainer.recipe.test_crop:
            image = image[..., :size, :size]
        drawn["Filters of the first layer"] = pictures.filters(first, place / "filters.png", names[0])
        drawn["Feature maps"] = pictures.feature_maps(model, image, shown, place / "feature_maps.png")
    if hasattr(model, "forward_f6"):
        drawn["What F6 draws"] = pictures.f6_drawings(model, data, place / "f6_drawings.png")
    return drawn


def _embedded(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{encoded}">'


def _table(rows: list) -> str:
    lines = []
    for i, row in enumerate(rows):
        cell = "td" if i else "th"
        values = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in row)
        lines.append("<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
