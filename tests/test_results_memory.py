"""The memory of CPU results: kept from one to the next, accounted for, and given back on demand."""

import functools
import itertools
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_processes import OPERATORS, inputs
from torch.profiler import ProfilerActivity, profile

from cuda_cnn import empty_cache
from cuda_cnn import functional as F

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")

MIB = 2**20


def in_a_process_of_its_own(test: Callable[[], None]) -> Callable[[], None]:
    """Other tests put an allocator of their own in torch's place, which is then the one for results, too."""

    @functools.wraps(test)
    def run() -> None:
        code = f"import {__name__} as tests; tests.{test.__name__}.__wrapped__()"
        there = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", code], env=there, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    return run


def result(mib: int, fill: float = 1.0) -> torch.Tensor:
    """A result of a kernel, of so many MiB, every element `fill`."""
    return F.concat([torch.full((1, mib * MIB // 8), fill)] * 2, dim=1)


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def mapping_of(address):
    """The flags of the memory mapping that holds an address."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = begin <= address < end
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
    raise ValueError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"), reason="this system has no huge pages"
)
@in_a_process_of_its_own
def test_large_results_lie_in_huge_pages():
    x, w, v = inputs()
    for name in ("conv2d", "max_pool2d", "local_response_norm", "batch_norm", "concat", "subsample"):
        y = OPERATORS[name](x.repeat(3, 1, 6, 6), w, v)
        assert y.nbytes > 6 * MIB
        assert "hg" in mapping_of(y.data_ptr() + 4 * MIB), name


@in_a_process_of_its_own
def test_results_do_not_overlap_whatever_the_order_of_their_ends():
    generator = torch.Generator().manual_seed(0)
    alive: dict[int, torch.Tensor] = {}
    for i in range(300):
        size = int(torch.randint(1, 2**18, (), generator=generator))
        alive[i] = F.concat([torch.full((2, size), float(i))] * 2, dim=1)
        if len(alive) > 12:
            victim = sorted(alive)[int(torch.randint(len(alive), (), generator=generator))]
            assert (alive.pop(victim) == victim).all()
        assert alive.get(i) is None or alive[i].data_ptr() % 64 == 0
    assert all((held == i).all() for i, held in alive.items())
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in alive.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


@in_a_process_of_its_own
def test_a_result_takes_the_place_of_one_that_ended():
    first = result(8)
    place = first.data_ptr()
    del first
    assert result(8).data_ptr() == place


@in_a_process_of_its_own
def test_no_page_faults_from_the_second_time_on():
    inputs = torch.ones(1, 8 * MIB)
    F.concat([inputs, inputs], dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    F.concat([inputs, inputs], dim=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 64 * MIB // 4096 // 8


@in_a_process_of_its_own
def test_threads_allocate_and_free_at_once():
    wrong = []

    def work(n: int) -> None:
        for i in range(40):
            mine = [F.concat([torch.full((1, 20000 * (i % 5 + 1)), float(n))] * 2, dim=1) for _ in range(3)]
            wrong.extend(1 for t in mine if not (t == n).all())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@in_a_process_of_its_own
def test_empty_cache_gives_memory_back_and_leaves_results_alone():
    held = result(16, fill=3.0)
    del_me = result(256)
    full = resident()
    del del_me
    assert resident() > full - 64 * MIB
    empty_cache()
    assert resident() < full - 200 * MIB
    assert (held == 3).all() and (result(256, fill=2.0) == 2).all()


@in_a_process_of_its_own
def test_the_profiler_sees_results_come_and_go():
    result(4)  # whatever it takes is kept from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = F.concat([torch.ones(1, MIB)] * 2, dim=1)
        del kept
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes.count(8 * MIB) == 1 and changes.count(-8 * MIB) == 1


@in_a_process_of_its_own
def test_results_are_ordinary_tensors():
    with torch.inference_mode():
        assert result(1).is_inference()
    grown = result(1)
    grown.resize_(2, MIB)
    assert (grown[0, : MIB // 4] == 1).all()
    assert grown.untyped_storage().resizable()
    assert result(1).share_memory_().is_shared()
    assert result(1).numpy().sum() == MIB // 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on_while_other_threads_allocate():
    program = """
import os, threading, torch
from cuda_cnn import functional as F
torch.set_num_threads(1)
x = torch.ones(1, 100000)
done = False
def work():
    while not done:
        F.concat([x, x], dim=1)
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
bad = 0
for i in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if (F.concat([x, x], dim=1) == 1).all() else 1)
    bad += os.waitpid(child, 0)[1] != 0
done = True
for t in threads: t.join()
raise SystemExit(bad)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
