"""Rivals take turns (A B C A B C …): a machine is never quite idle, and ratios are then of neighbours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Call", "Clock", "WallClock", "interleave"]

LEAST_SAMPLE = 1e-3
LONG_SAMPLE = 0.02
LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Call:
    """What is timed, and the switches (not timed) that hold meanwhile."""

    run: Callable[[], object]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Clock(Protocol):
    """How one sample is taken. `prepare` returns what `sample` takes: the call itself, or its CUDA graph."""

    repeatable: bool

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]: ...

    def sample(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of one run, the mean of `repeats`."""
        ...


class WallClock:
    """A CPU's time. `flush` runs before each sample, untimed; a flushed sample is of a single run."""

    def __init__(self, flush: Callable[[], object] | None = None) -> None:
        self.flush, self.repeatable = flush, flush is None

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]:
        return run

    def sample(self, run: Callable[[], object], repeats: int) -> float:
        if self.flush:
            self.flush()
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - began) / repeats


def interleave(
    calls: dict[str, Call],
    seconds: float = 0.5,
    clock: Clock | None = None,
    rounds: int = LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Times the calls in turns for about `seconds`, at least `rounds` times each: seconds of each, round by round.

    A sample repeats a short call until it lasts a millisecond, where the clock allows it.
    """
    clock = clock or WallClock()
    prepared = []
    for call in calls.values():
        with call.around():
            run = clock.prepare(call.run)
            prepared.append((run, call.around, _repeats(run, clock)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    began, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - began < seconds:
        for (run, around, repeats), samples in zip(prepared, times.values()):
            with around():
                samples.append(clock.sample(run, repeats))
        done += 1
    return times


def _repeats(run: Callable[[], object], clock: Clock) -> int:
    # The first run is a warm-up; a long one says all that is needed.
    if clock.sample(run, 1) > LONG_SAMPLE or not clock.repeatable:
        return 1
    once = min(clock.sample(run, 1) for _ in range(2))
    return max(1, round(LEAST_SAMPLE / max(once, 1e-9)))
