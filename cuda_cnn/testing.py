"""A pytest plugin: `pytest -p cuda_cnn.testing …` runs any tests of PyTorch code on these kernels.

It calls :func:`cuda_cnn.enable` before the tests are collected, and says at the end how many calls reached these
kernels, and why others did not. `CUDA_CNN_OPS=conv2d,max_pool2d` limits it to some operators.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import cuda_cnn

# How often a function was called; the reason is empty where our kernel served it.
_counts: Counter[tuple[str, str]] = Counter()
_log: Any = None


def pytest_configure(config: Any) -> None:
    global _log
    ops = os.environ.get("CUDA_CNN_OPS", "all")
    _log = cuda_cnn.enable("all" if ops == "all" else ops.split(","))


def pytest_sessionfinish(session: Any) -> None:
    for call, count in _log.counts.items():
        _counts[call.name, call.reason] += count
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: its parent prints
        session.config.workeroutput["cuda_cnn"] = [[*key, count] for key, count in _counts.items()]


def pytest_unconfigure(config: Any) -> None:
    cuda_cnn.disable()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ours = Counter({name: n for (name, reason), n in _counts.items() if not reason})
    theirs = Counter({key: n for key, n in _counts.items() if key[1]})
    terminalreporter.section("cuda_cnn")
    reached, fell = sum(ours.values()), sum(theirs.values())
    terminalreporter.line(f"{reached} calls reached cuda_cnn's kernels, {fell} fell back to PyTorch's")
    for name, count in ours.most_common():
        terminalreporter.line(f"{count:8d}  {name}")
    for (name, reason), count in theirs.most_common(20):
        terminalreporter.line(f"{count:8d}  {name}: PyTorch's, because of {reason}")


class _Parent:
    """Adds up what the processes of pytest-xdist have counted."""

    def pytest_testnodedown(self, node: Any, error: Any) -> None:
        for name, reason, count in getattr(node, "workeroutput", {}).get("cuda_cnn", ()):
            _counts[name, reason] += count


def pytest_plugin_registered(plugin: Any, manager: Any) -> None:
    if manager.hasplugin("dsession") and not manager.hasplugin("cuda_cnn.testing.parent"):
        manager.register(_Parent(), "cuda_cnn.testing.parent")
