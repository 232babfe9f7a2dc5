"""Medians, quartiles, the ratio of two series and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Ratio", "Spread", "geometric_mean", "quartiles", "ratio", "spread"]

RESAMPLES = 1000
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Median, lower and upper quartile, number of values."""

    median: float
    low: float
    high: float
    count: int


class Ratio(NamedTuple):
    """The median of paired ratios, its quartiles, and the bootstrap interval of the median."""

    median: float
    low: float
    high: float
    least: float
    most: float


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile (inclusive method); a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def spread(values: Sequence[float]) -> Spread:
    return Spread(*quartiles(values), len(values))


def ratio(ours: Sequence[float], rival: Sequence[float], seed: int = 0) -> Ratio:
    """How many times faster ours is: rival / ours, round by round, for series measured in turns.

    least, most: the 95 % percentile interval of the median over 1000 resamplings of the rounds (Efron, "Bootstrap
    methods", 1979). Raises ValueError for series of different length or of none.
    """
    if len(ours) != len(rival) or not ours:
        raise ValueError(f"ratio: expected two series of one length, got {len(ours)} and {len(rival)} values")
    rounds = np.asarray(rival, dtype=np.float64) / np.asarray(ours, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    medians = np.median(rounds[picked], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    least, most = np.percentile(medians, [tail, 100 - tail])
    return Ratio(*quartiles(rounds.tolist()), float(least), float(most))


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log v)); nan of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan
