"""pytest-benchmark over the networks' layers: one file an operator, the shapes and the timer of the demo.

`make bench`, or `pytest benchmarks -k "conv2d and vgg16"`. Kept and compared:
`pytest benchmarks --benchmark-save=NAME`, then `--benchmark-compare=NAME --benchmark-compare-fail=median:5%`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cuda_cnn.bench.cases import build, vendor
from cuda_cnn.bench.shapes import Layer, short_name
from cuda_cnn.bench.timing import compare

BATCH = {"lenet5": 64, "alexnet": 8, "vgg16": 2, "resnet50": 4, "densenet121": 4, "googlenet": 4}
SECONDS = 0.3
ROUNDS = 10
_LINES: list[str] = []


def pytest_terminal_summary(terminalreporter) -> None:
    if _LINES:
        terminalreporter.section("beside torch, in turns: median ratio (quartiles), above 1 is faster")
        terminalreporter.write("\n".join([*_LINES, ""]))


@pytest.fixture
def against_torch(benchmark) -> Callable[[Layer, bool], None]:
    """Verifies a layer, times it beside torch in turns (extra_info), then for pytest-benchmark's table."""

    def run(layer: Layer, backward: bool) -> None:
        case = build(layer, BATCH[layer.network], backward)
        times = compare(case.ours, case.rival, SECONDS)
        middle, low, high = times.ratio
        benchmark.group = f"{layer.op} {'train' if backward else 'forward'}"
        benchmark.extra_info.update(
            layer=str(layer),
            batch=BATCH[layer.network],
            rival=vendor(layer.op),
            rival_seconds=times.rival_median,
            times_torch=middle,
            times_torch_quartiles=[low, high],
            error=case.ours_error,
            rival_error=case.rival_error,
        )
        _LINES.append(
            f"{short_name(layer):34} {benchmark.group:28} {1e3 * times.ours_median:8.2f} ms  "
            f"× {vendor(layer.op):13} {middle:6.2f} ({low:.2f} to {high:.2f})  error {case.ours_error:.0e}"
        )
        benchmark.pedantic(case.ours, rounds=ROUNDS, warmup_rounds=1)

    return run
