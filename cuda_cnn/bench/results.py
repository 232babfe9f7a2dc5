"""The file of a run: header, rows, and how it is kept. Written as it is measured, so that nothing is lost."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Results", "key", "load", "refuse_outputs"]

FORMAT = 1
SECTIONS = ("rows", "networks", "ladder", "scaling")
SAVE_EVERY = 2.0
_KEY = ("model", "form", "network", "layer", "op", "shape", "args", "pass", "dtype", "layout", "batch")
_MORE = ("timing", "threads", "sweep", "variant")


def key(row: dict[str, Any]) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row.get(name) for name in (*_KEY, *_MORE)])


class Results:
    """The rows of a run, by section, with its file."""

    def __init__(self, header: dict[str, Any], path: Path | None = None) -> None:
        self.path, self.saved = path, 0.0
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "header": header,
            "roofline": {},
            "complete": False,
            **{name: [] for name in SECTIONS},
        }

    @property
    def header(self) -> dict[str, Any]:
        return self.document["header"]

    def rows(self, section: str = "rows") -> list[dict[str, Any]]:
        return self.document[section]

    def keys(self, section: str = "rows") -> set[str]:
        return {key(row) for row in self.rows(section)}

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.rows(section).append(row)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Atomically: a reader, or a run that is killed, never leaves half a file."""
        if self.path is None:
            return
        write_text(self.path, _text(self.document))
        self.saved = time.monotonic()


def _text(document: dict[str, Any]) -> str:
    """JSON with a row a line, so that a change of a run can be read as one; numbers of six digits."""
    parts = []
    for name, value in document.items():
        text = json.dumps(_rounded(value), ensure_ascii=False)
        if name in SECTIONS and value:
            lines = (json.dumps(_rounded(row), ensure_ascii=False) for row in value)
            text = "[\n" + ",\n".join(lines) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{" + ",\n".join(parts) + "}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path) -> Results:
    """Raises ValueError for what is not a run's file, OSError where it cannot be read."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a run of cuda-cnn bench: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or "rows" not in document:
        raise ValueError(f"{path}: not a run of cuda-cnn bench, or of another version's format")
    found = Results(document["header"], path)
    found.document.update(document)
    return found


def refuse_outputs(paths: list[str | None], allow_existing: bool) -> None:
    """Before anything is measured: ValueError for a file that exists, OSError for one that cannot be written."""
    for path in (Path(p) for p in paths if p):
        if path.exists() and not allow_existing:
            raise ValueError(
                f"{path} exists: --overwrite replaces it, --resume keeps its rows and adds the rest"
            )
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
