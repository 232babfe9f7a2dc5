"""A run as one page that needs nothing else: header, means, losses, pictures, every row."""

from __future__ import annotations

from html import escape
from typing import Any

from . import ladder, machine, networks, pictures, report, scaling

__all__ = ["page"]

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
pre { overflow-x: auto; background: #f6f6f4; padding: .8em; font-size: 12px }
table { border-collapse: collapse; font-size: 12px }
th, td { padding: .15em .6em; text-align: left; white-space: nowrap }
th { border-bottom: 1px solid #888 } tr.slower td { background: #fbe9e7 } svg { max-width: 100%; height: auto }
"""


def page(document: dict[str, Any]) -> str:
    """HTML with the pictures inside as SVG. Raises ImportError without matplotlib."""
    parts = [f"<h1>cuda_cnn on {escape(document['header']['machine'])}</h1>"]
    parts.append(_pre("\n".join(machine.words(document["header"]))))
    if not document["complete"]:
        parts.append("<p><b>This run was stopped before its end.</b></p>")
    if document["rows"]:
        parts += ["<h2>Means and losses</h2>", _pre(report.summary(document, most=10**6))]
    for title, module, section in (
        ("Networks", networks, "networks"),
        ("Ladders", ladder, "ladder"),
        ("Scaling", scaling, "scaling"),
    ):
        if document[section]:
            parts += [f"<h2>{title}</h2>", _pre(module.table(document[section]))]
    parts.append("<h2>Pictures</h2>")
    for name, draw in pictures.drawings(document):
        drawn = pictures.save(draw(), "svg", name).decode()
        parts.append(f"<h3>{escape(name)}</h3>{drawn[drawn.index('<svg') :]}")
    if document["rows"]:
        parts += ["<h2>Every row</h2>", _rows(document)]
    head = f'<meta charset="utf-8"><title>cuda_cnn bench</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _rows(document: dict[str, Any]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in report.COLUMNS) + "</tr>"]
    for row in document["rows"]:
        slower = any(ratio[0] < 1 for ratio in row["ratios"].values())
        cells = "".join(f"<td>{escape(c)}</td>" for c in report.cells(row, document["roofline"]))
        lines.append(f"<tr{' class=slower' if slower else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
