"""The GPU's path of `cuda-cnn bench`, end to end without a card: kernels are emulated, torch.cuda has a stand-in."""

import contextlib
import time
from types import SimpleNamespace

import pytest
from emulation import Unavailable, emulated
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_cnn import cli
from cuda_cnn.bench import command, devices, run
from cuda_cnn.bench.results import load
from cuda_cnn.bench.shapes import Layer

WINDOW = {"size": 3, "stride": 1, "padding": 1}
TINY = [
    Layer("lenet5", "c", "conv2d", (8, 6, 6), {"filters": 8, "groups": 1, "bias": False, **WINDOW}),
    Layer(
        "lenet5", "n", "local_response_norm", (8, 4, 4), {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
    ),
    Layer("lenet5", "p", "max_pool2d", (8, 4, 4), {**WINDOW, "ceil_mode": False}),
    Layer("lenet5", "b", "batch_norm", (8, 4, 4), {"training": True}),
    Layer("lenet5", "t", "concat", (8, 4, 4), {"others": (8,)}),
]


class Card:
    """What the clocks and the header ask of torch.cuda; graphs record operators and run them again."""

    def __init__(self):
        self.log, self.streams = [], []

    def Event(self, enable_timing):
        card = self

        class Event:
            def record(self):
                card.log.append("event")
                self.when = time.perf_counter()

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.when - self.when) + 1e-6

        return Event()

    class Graph(TorchDispatchMode):
        def __init__(self, card):
            super().__init__()
            self.card, self.calls = card, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

        def replay(self):
            self.card.log.append("replay")
            for function, args, kwargs in self.calls:
                function(*args, **kwargs)

    def CUDAGraph(self):
        return Card.Graph(self)

    def graph(self, graph, stream):
        assert stream == self.streams[-1] == "bench", "captured on the stream that everything runs on"
        return graph

    def Stream(self):
        return "bench"

    def current_stream(self):
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def synchronize(self):
        self.log.append("synchronize")

    def get_device_name(self):
        return "Emulated"

    def get_device_properties(self, _):
        return SimpleNamespace(L2_cache_size=1 << 10)


@pytest.fixture
def card(monkeypatch):
    made = Card()
    monkeypatch.setattr(command, "device", lambda name: devices.CudaDevice(made, "cpu"))
    monkeypatch.setattr(run, "layers", lambda network=None, op=None: TINY)
    monkeypatch.setattr(run.roofline, "measure", lambda device, dtype: run.roofline.Roofline(1e9, 1e9))
    try:
        with emulated():
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("timing", devices.TIMINGS)
def test_the_suite_runs_end_to_end_over_the_emulated_device(card, tmp_path, timing):
    path = tmp_path / "run.json"
    options = ["--suite", "lenet5", "--batch", "1", "--seconds", "0", "--pass", "forward,dgrad,wgrad"]
    options += ["--dtype", "float32,tf32,bfloat16", "--timing", timing, "--json", str(path), "--quick"]
    assert cli.main(["bench", *options]) == 0
    rows = load(path).rows()
    assert len(rows) == 3 * (3 + 4 * 2) and not any(row["wrong"] for row in rows)
    assert all("cuda_cnn" in row["times"] for row in rows)
    assert {row["timing"] for row in rows} == {timing} and load(path).header["machine"] == "Emulated"
    # A CPU's torch has no local_response_norm in bfloat16: absent, and said why.
    missing = [row for row in rows if "torch" not in row["ratios"]]
    assert all((row["op"], row["dtype"]) == ("local_response_norm", "bfloat16") for row in missing)
    assert all("not implemented for 'BFloat16'" in row["absent"]["torch"] for row in missing)
    assert ("replay" in card.log) == (timing == "graph")
    assert ("event" in card.log) == (timing != "e2e")
    assert not card.streams
