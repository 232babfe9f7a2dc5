"""Progress bars of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

__all__ = ["progress_bar"]


def progress_bar(columns: Callable[[ModuleType], Iterable], **options):
    """rich's progress bar of columns(rich.progress), or None where rich is missing or the output is no terminal."""
    try:
        from rich import console, progress
    except ImportError:
        return None
    out = console.Console()
    return progress.Progress(*columns(progress), console=out, **options) if out.is_terminal else None
