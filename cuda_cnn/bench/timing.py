"""A timer for two rivals on a machine that is never quite idle: they take turns, ratios are of neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Comparison", "compare", "quartiles"]

LEAST_SAMPLE = 1e-3
LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Comparison:
    """Times of one call in seconds, turn by turn."""

    ours: list[float]
    rival: list[float]

    @property
    def ratio(self) -> tuple[float, float, float]:
        """How many times faster ours is: median, lower and upper quartile over the turns."""
        return quartiles([theirs / mine for mine, theirs in zip(self.ours, self.rival)])

    @property
    def ours_median(self) -> float:
        return statistics.median(self.ours)

    @property
    def rival_median(self) -> float:
        return statistics.median(self.rival)


def compare(ours: Callable[[], object], rival: Callable[[], object], seconds: float = 0.5) -> Comparison:
    """Calls the two in turns (A B A B …) for about `seconds`, at least seven times each.

    A sample repeats a short call until it lasts a millisecond.
    """
    calls = [(run, _repeats(run)) for run in (ours, rival)]
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() < end:
        for (run, repeats), samples in zip(calls, times):
            samples.append(_sample(run, repeats))
    return Comparison(*times)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile (inclusive method); a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _repeats(run: Callable[[], object]) -> int:
    run()
    once = min(_sample(run, 1) for _ in range(2))
    return max(1, round(LEAST_SAMPLE / max(once, 1e-9)))


def _sample(run: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats
