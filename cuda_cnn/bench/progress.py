"""How far a run is: a bar with the time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from ..terminal import progress_bar

__all__ = ["Progress"]


class Progress:
    """`with Progress(total) as bar: bar.step(line)`. Time left is what the rows so far took, for those that remain."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.done, self.quiet, self.began = total, 0, quiet, time.monotonic()
        self.bar = None if quiet else progress_bar(_columns)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("bench", total=self.total)
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def left(self) -> float:
        """Seconds."""
        return (time.monotonic() - self.began) / max(1, self.done) * (self.total - self.done)

    def step(self, line: str) -> None:
        self.done += 1
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
            self.bar.advance(self.task)
        elif not self.quiet:
            minutes, seconds = divmod(round(self.left()), 60)
            print(f"[{self.done}/{self.total}, {minutes}:{seconds:02d} left] {line}", flush=True)


def _columns(rich) -> tuple:
    return rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
