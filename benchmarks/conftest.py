"""pytest-benchmark over the networks' layers: one file an operator, the shapes, cases and timer of `cuda-cnn bench`.

`make bench`, or `pytest benchmarks --benchmark-enable -k "conv2d and vgg16"`. Kept and compared:
`--benchmark-save=NAME`, then `--benchmark-compare=NAME --benchmark-compare-fail=median:5%` (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from cuda_cnn.bench.cases import Problem
from cuda_cnn.bench.rivals import vendor
from cuda_cnn.bench.run import Settings, row_of
from cuda_cnn.bench.shapes import Layer, short_name

BATCH = {"lenet5": 64}
SETTINGS = Settings(batch=4, seconds=0.3, memory=False)
ROUNDS = 10
_LINES: list[str] = []


def pytest_terminal_summary(terminalreporter) -> None:
    if _LINES:
        terminalreporter.section("beside torch, in turns: median ratio (95 % of it), above 1 is faster")
        terminalreporter.write("\n".join([*_LINES, ""]))


@lru_cache(maxsize=1)  # the passes of a layer come one after another
def _problem(layer: Layer) -> Problem:
    return Problem(layer, BATCH.get(layer.network, SETTINGS.batch))


@pytest.fixture
def against_torch(benchmark) -> Callable[[Layer, str], None]:
    """Verifies a layer, times it beside torch in turns (extra_info), then for pytest-benchmark's table."""

    def run(layer: Layer, direction: str) -> None:
        problem = _problem(layer)
        row = row_of(problem, direction, problem.device.default_timing, SETTINGS)
        assert not row["wrong"], row["wrong"]
        ours, theirs = row["times"]["cuda_cnn"], row["times"]["torch"]
        middle, low, high, least, most = row["ratios"]["torch"]
        benchmark.group = f"{layer.op} {direction}"
        benchmark.extra_info.update(
            layer=str(layer),
            batch=problem.batch,
            rival=vendor(layer.op),
            rival_seconds=theirs["seconds"][0],
            times_torch=middle,
            times_torch_quartiles=[low, high],
            times_torch_interval=[least, most],
            flops=row["flops"],
            bytes=row["bytes"],
            error=ours["error"],
            rival_error=theirs["error"],
            algorithm=ours["algorithm"],
        )
        _LINES.append(
            f"{short_name(layer)[-40:]:40} {benchmark.group:20} {1e3 * ours['seconds'][0]:8.2f} ms  "
            f"× {vendor(layer.op):13} {middle:6.2f} ({least:.2f} to {most:.2f})  error {ours['error']:.0e}"
        )
        benchmark.pedantic(problem.case(direction, "cuda_cnn").call.run, rounds=ROUNDS, warmup_rounds=1)

    return run
