"""Statistics on known series, the timer with a clock of its own, and the gate between two runs."""

import copy
import math

import numpy as np
import pytest

from cuda_cnn.bench import compare, stats, timing
from cuda_cnn.bench.results import Results
from cuda_cnn.bench.roofline import Roofline
from cuda_cnn.bench.settings import UnequalError
from cuda_cnn.bench.timing import Call, interleave
from cuda_cnn.bench.work import Work


def test_quartiles():
    assert stats.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert stats.quartiles([2.5]) == (2.5, 2.5, 2.5)
    assert stats.spread([1.0, 2.0, 3.0]) == (2.0, 1.5, 2.5, 3)


def test_ratio_is_of_neighbours():
    """A machine that becomes ten times slower halfway does not touch a ratio of rounds."""
    ours = [1.0, 1.1, 0.9, 10.0, 11.0, 9.0]
    found = stats.ratio(ours, [2 * t for t in ours])
    assert found == pytest.approx((2.0,) * 5)
    assert stats.ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])[:3] == (1.0, 0.75, 1.5)
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        stats.ratio([1.0], [1.0, 2.0])


def test_bootstrap_interval_holds_the_median_as_often_as_it_says():
    """Of 300 samples of 25 from a lognormal distribution of median 1.5, about 95 % of the intervals hold 1.5."""
    generator = np.random.default_rng(7)
    held = 0
    for seed in range(300):
        sample = 1.5 * np.exp(0.2 * generator.standard_normal(25))
        _, _, _, least, most = stats.ratio([1.0] * 25, sample.tolist(), seed)
        held += least <= 1.5 <= most
    assert 0.90 <= held / 300 <= 0.99


def test_interval_narrows_with_rounds_and_is_the_same_every_time():
    series = np.random.default_rng(0).normal(1.0, 0.1, 400).tolist()
    few, many = stats.ratio([1.0] * 20, series[:20]), stats.ratio([1.0] * 400, series)
    assert many.most - many.least < 0.5 * (few.most - few.least)
    assert few == stats.ratio([1.0] * 20, series[:20])


def test_geometric_mean():
    assert stats.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert stats.geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(stats.geometric_mean([]))


def test_roofline_is_the_lower_of_two_limits():
    roof = Roofline(bandwidth=10.0, peak=100.0)
    assert [roof.attainable(x) for x in (1, 10, 50)] == [10.0, 100.0, 100.0]
    assert roof.seconds(Work(flops=1000, bytes=10)) == 10.0
    assert roof.seconds(Work(flops=0, bytes=50)) == 5.0


# ---- Timer ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def _rival(name, seconds, clock, calls):
    def run():
        calls.append(name)
        clock[0] += seconds

    return Call(run)


def test_rivals_take_turns(clock):
    calls = []
    found = interleave(
        {n: _rival(n, s, clock, calls) for n, s in (("a", 0.002), ("b", 0.006), ("c", 0.004))}, 0.1
    )
    assert calls[9:] == ["a", "b", "c"] * (
        (len(calls) - 9) // 3
    )  # after the first calls, which find the repeats
    assert stats.ratio(found["a"], found["b"]) == pytest.approx((3.0,) * 5)
    assert len(found["a"]) == len(found["c"]) == 9


def test_short_calls_are_repeated_and_long_ones_still_have_their_rounds(clock):
    calls = []
    found = interleave({"short": _rival("short", 1e-5, clock, calls)}, 0.01)
    assert calls.count("short") >= 100 * len(found["short"]) and found["short"][0] == pytest.approx(1e-5)
    assert len(interleave({"long": _rival("long", 5.0, clock, [])}, 0.1, rounds=4)["long"]) == 4


def test_switches_hold_while_a_rival_runs_and_are_not_timed(clock):
    state = []

    class Around:
        def __enter__(self):
            state.append("on")
            clock[0] += 3.0

        def __exit__(self, *_):
            state.pop()

    def run():
        assert state == ["on"]
        clock[0] += 0.002

    found = interleave({"a": Call(run, Around), "b": _rival("b", 0.002, clock, [])}, 0.1)
    assert found["a"] == pytest.approx(found["b"]) and not state


def test_a_cold_sample_is_flushed_and_single(clock):
    flushed = []
    cold = timing.WallClock(lambda: flushed.append(1))
    calls = []
    found = interleave({"a": _rival("a", 1e-5, clock, calls)}, 0.0, cold, rounds=5)
    assert len(flushed) == len(calls) == 6 and found["a"] == pytest.approx([1e-5] * 5)


# ---- The gate ---------------------------------------------------------------------------------------------

HEADER = {
    "machine": "M",
    "device": "cpu",
    "threads": 2,
    "instruction_set": "avx2",
    "tf32": None,
    "commit": "abc",
    "torch": "2",
}


def _run(seconds, layer="l"):
    results = Results(HEADER)
    times = {"seconds": list(seconds)}
    row = {"network": "n", "layer": layer, "op": "conv2d", "shape": [1, 2, 3], "args": {}, "words": ""}
    row |= {"pass": "forward", "dtype": "float32", "layout": "channels_last", "batch": 4, "timing": "e2e"}
    results.add("rows", {**row, "times": {"cuda_cnn": times, "torch": {"seconds": [9, 9, 9]}}})
    return results


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ((1.20, 1.18, 1.22), "slower"),  # the planted 20 %
        ((0.80, 0.78, 0.82), "faster"),
        ((1.04, 1.02, 1.06), "same"),
        ((1.20, 0.95, 1.60), "unsure"),  # as far, but within the spread
    ],
)
def test_a_planted_slowdown_is_found(new, verdict):
    (change,) = compare.changes(_run((1.0, 0.98, 1.02)), _run(new), 0.05)
    assert change.verdict == verdict and change.implementation == "cuda_cnn"
    assert f"1 {verdict}" in compare.verdicts([change])


def test_runs_that_cannot_be_compared_are_refused():
    old, new = _run((1, 1, 1)), _run((1, 1, 1))
    other = copy.deepcopy(new)
    other.header["threads"] = 4
    with pytest.raises(UnequalError, match="differ in threads: 2 before, 4 now"):
        compare.changes(old, other, 0.05)
    with pytest.raises(ValueError, match="no row in common"):
        compare.changes(old, _run((1, 1, 1), layer="another"), 0.05)


def test_percentages():
    assert compare.parse_percent("5%") == compare.parse_percent("5") == 0.05
    for text in ("five", "-1%", "nan", ""):
        with pytest.raises(ValueError, match="expected a percentage such as 5%"):
            compare.parse_percent(text)
