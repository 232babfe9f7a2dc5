"""The emulator under test: it must catch the mistakes planted in kernels, and not blame correct ones."""

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from emulation import LANDINGS, SCHEDULES, Engine, Unavailable, emulated, torch_engine
from emulation.build import HERE, KERNELS, build, sanitizer_runtime

# In the order of enum class Bug in emulation/kernels/planted.cu.
BUGS = [
    *("none", "missing barrier", "missing wait", "early prefetch", "wrong swizzle", "no swizzle"),
    *("loader off by one", "shared out of bounds", "unwritten rows", "divergent barrier", "incomplete warp"),
    *("misaligned copy", "unrounded", "plain global out of bounds", "plain shared out of bounds"),
    *("shuffle as fence", "early exit", "atomics", "warp barrier for block"),
    *("overlapping blocks", "reads other block", "register out of bounds", "host table out of bounds"),
]
CHECKED = {"races": True, "bounds": True}
EVERY_ORDER = [
    {"schedule": schedule, "landing": landing, "seed": seed}
    for schedule, landing in itertools.product(SCHEDULES, LANDINGS)
    for seed in ([1, 2, 3] if schedule in ("random", "priorities") else [1])
]


class Kernels:
    """The functions of planted.cu, each with its result and the emulator's report: empty if all is well."""

    def __init__(self, library: ctypes.CDLL, engine: Engine | None = None) -> None:
        self.library, self.engine = library, engine

    def gemm(
        self, bug: str = "none", m: int = 100, n: int = 72, depth: int = 136
    ) -> tuple[torch.Tensor, str]:
        a, b = matrices(m, n, depth)
        return self._run("run_gemm", torch.full((m, n), float("nan")), a, b, m, n, depth, bug=bug)

    def row_sums(self, bug: str = "none", rows: int = 4, columns: int = 200) -> tuple[torch.Tensor, str]:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        return self._run("run_row_sums", torch.zeros(rows), x, rows, columns, bug=bug)

    def tf32_product(self, a: torch.Tensor, b: torch.Tensor, bug: str = "none") -> tuple[torch.Tensor, str]:
        return self._run("run_tf32_product", torch.full((16, 8), float("nan")), a, b, bug=bug)

    def _run(
        self, name: str, result: torch.Tensor, *inputs: Any, bug: str = "none"
    ) -> tuple[torch.Tensor, str]:
        """Calls name(bug, result, *inputs), with tensors as pointers to where the kernels run."""
        device = "cpu" if self.engine else "cuda"
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in (result, *inputs)]
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        function = getattr(self.library, name)
        function.restype = ctypes.c_bool
        with self.engine.registered(tensors) if self.engine else contextlib.nullcontext():
            succeeded = function(BUGS.index(bug), *values)
        report = self.engine.report if self.engine else "" if succeeded else "the launch failed"
        assert succeeded == (not report)
        return tensors[0].cpu(), report


def matrices(m: int, n: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-8, 9, (rows, depth), generator=generator).bfloat16() for rows in (m, n))


def product(m: int = 100, n: int = 72, depth: int = 136) -> torch.Tensor:
    a, b = matrices(m, n, depth)
    return a.float() @ b.float().T  # whole numbers below 2²⁴: exact in any order


def emulated_kernels(name: str, **options: str) -> Kernels:
    try:
        engine = Engine(build(name, KERNELS, **options))
    except Unavailable as reason:
        pytest.skip(str(reason))
    return Kernels(engine.library, engine)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return emulated_kernels("planted")


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def kernels_anywhere(request, tmp_path_factory) -> Kernels:
    """For tests of what the emulator takes from the PTX ISA: on a GPU they show whether we read it rightly."""
    if request.param == "emulated":
        return request.getfixturevalue("kernels")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not torch.cuda.is_available() or nvcc is None:
        pytest.skip("needs a GPU and nvcc")
    library = tmp_path_factory.mktemp("planted") / "planted.so"
    flags = ["-shared", "-Xcompiler", "-fPIC", "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())]
    includes = ["-I", HERE.parents[1] / "csrc"]
    subprocess.run([nvcc, *flags, *includes, HERE / "kernels/planted.cu", "-o", library], check=True)
    return Kernels(ctypes.CDLL(str(library)))


# ---- Correct kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks", [{}, CHECKED], ids=["unchecked", "checked"])
def test_correct_kernels_in_every_order(kernels, checks):
    for order in EVERY_ORDER:
        with kernels.engine.options(**order, **checks):
            d, report = kernels.gemm()
            assert report == "", order
            assert torch.equal(d, product()), order
            for columns in (1, 50, 200):
                _, report = kernels.row_sums(columns=columns)
                assert report == "", order


def test_results_do_not_depend_on_the_order(kernels):
    results = []
    for order in EVERY_ORDER:
        with kernels.engine.options(**order):
            results.append(kernels.row_sums()[0])
    assert all(torch.equal(result, results[0]) for result in results)
    exact = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).double().sum(1)
    assert (results[0] - exact).abs().max() < 1e-5


def test_portable_switch_between_fibers():
    kernels = emulated_kernels("planted_ucontext", flags="-DCUDA_CNN_UCONTEXT")
    with kernels.engine.options(**CHECKED):
        d, report = kernels.gemm()
    assert report == ""
    assert torch.equal(d, product())


# ---- Mistakes that the checks report -----------------------------------------------------------------------

REPORTED = [
    ("gemm", "missing barrier", r"race: shared read|uninitialised shared read"),
    ("gemm", "missing wait", r"shared read of \+\d+, where a copy started by thread \d+ is still in flight"),
    ("gemm", "early prefetch", r"race: shared write .* not ordered after the read|still in flight"),
    ("gemm", "loader off by one", r"cp.async: global read of 16 bytes at .* outside every tensor"),
    ("gemm", "shared out of bounds", r"shared access of 16 bytes at \+\d+, outside the 24576 bytes"),
    ("gemm", "unwritten rows", r"uninitialised shared read"),
    ("gemm", "divergent barrier", r"divergent barrier|race: shared"),
    ("gemm", "incomplete warp", r"other lanes of the warp wait|divergent warp"),
    ("gemm", "misaligned copy", r"cp.async: a copy of 16 bytes .* is misaligned"),
    ("gemm", "warp barrier for block", r"race: shared|uninitialised shared read"),
    ("row_sums", "missing barrier", r"uninitialised shared read|race: shared"),
    ("row_sums", "plain global out of bounds", r"global read of 4 bytes at .* outside every tensor"),
    ("row_sums", "plain shared out of bounds", r"shared read of 4 bytes at \+384, outside the 384 bytes"),
    (
        "row_sums",
        "overlapping blocks",
        r"race: global write of \S+, which block \d of the same launch writes",
    ),
    ("row_sums", "shuffle as fence", r"uninitialised shared read|race: shared"),
]


@pytest.mark.parametrize(
    "kernel,bug,expected", REPORTED, ids=[f"{kernel}-{bug}" for kernel, bug, _ in REPORTED]
)
def test_mistake_is_reported_in_every_order(kernels, kernel, bug, expected):
    for order in EVERY_ORDER:
        with kernels.engine.options(**CHECKED, **order):
            _, report = getattr(kernels, kernel)(bug)
        assert re.search(rf"^planted\.cu:\d+: .*({expected})", report, re.MULTILINE), (order, report)


def test_read_of_what_another_block_writes_is_reported(kernels):
    with kernels.engine.options(schedule="forward", **CHECKED):  # in reverse the other block has not run yet
        assert "race: global read" in kernels.row_sums("reads other block")[1]


def test_exit_before_a_barrier_is_reported(kernels):
    _, report = kernels.row_sums("early exit", columns=50)
    assert "divergent barrier" in report
    assert kernels.row_sums("early exit", columns=200)[1] == ""  # where no thread leaves early


def test_divergent_barrier_is_reported_without_checks(kernels):
    assert "divergent barrier" in kernels.gemm("divergent barrier")[1]


def test_unrounded_tf32_is_reported(kernels):
    a, b = torch.full((16, 8), 1 + 2**-20), torch.ones(8, 8)
    assert kernels.tf32_product(a, b)[1] == ""
    assert "not rounded" in kernels.tf32_product(a, b, "unrounded")[1]


# ---- Mistakes that the results show, without any check -----------------------------------------------------


@pytest.mark.parametrize(
    "bug",
    [
        "missing barrier",
        "missing wait",
        "early prefetch",
        "wrong swizzle",
        "unwritten rows",
        "warp barrier for block",
    ],
)
def test_mistake_spoils_the_result(kernels, bug):
    with kernels.engine.options(schedule="priorities"):
        d, _ = kernels.gemm(bug)
    assert not torch.equal(d, product())


def test_missing_wait_is_right_by_luck(kernels):
    """… when copies land early, as they mostly do on a device: the check reports it all the same."""
    with kernels.engine.options(landing="early"):
        assert torch.equal(kernels.gemm("missing wait")[0], product())
    with kernels.engine.options(landing="early", **CHECKED):
        assert "still in flight" in kernels.gemm("missing wait")[1]


def test_atomics_differ_with_the_order(kernels):
    results = set()
    for order in EVERY_ORDER:
        with kernels.engine.options(**order):
            results.add(tuple(kernels.row_sums("atomics")[0].tolist()))
    assert len(results) > 1


# ---- Mistakes that the sanitizers report -------------------------------------------------------------------

SANITIZED = """
import ctypes, sys
library, bug, columns = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for _ in range(2):  # stacks are used again
    sums, x = (ctypes.c_float * 4)(), (ctypes.c_float * (4 * columns))()
    assert library.run_row_sums(bug, sums, x, 4, columns)
    d, a, b = (ctypes.c_float * (100 * 72))(), (ctypes.c_uint16 * (100 * 136))(), (ctypes.c_uint16 * (72 * 136))()
    assert library.run_gemm(bug, d, a, b, 100, 72, 136)
"""


@pytest.mark.parametrize(
    "bug,columns,expected",
    [
        ("none", 200, None),
        ("plain global out of bounds", 200, "AddressSanitizer: heap-buffer-overflow"),
        ("plain shared out of bounds", 200, "AddressSanitizer: use-after-poison"),
        ("loader off by one", 200, "AddressSanitizer: heap-buffer-overflow"),
        (
            "register out of bounds",
            200,
            "stack-buffer-overflow|insufficient space for an object of type 'float'",
        ),
        ("host table out of bounds", 300, "global-buffer-overflow|index 2 out of bounds for type 'int"),
    ],
)
def test_sanitizers_report(bug, columns, expected):
    """The same kernels and engine under AddressSanitizer and UBSan, as .ci/steps/50-asan runs the operators'."""
    try:
        library = build("planted", KERNELS, sanitize=True)
    except Unavailable as reason:
        pytest.skip(str(reason))
    environment = {**os.environ, "LD_PRELOAD": sanitizer_runtime(), "PYTHONMALLOC": "malloc"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    command = [sys.executable, "-c", SANITIZED, library, str(BUGS.index(bug)), str(columns)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if expected is None:
        assert result.returncode == 0 and "Sanitizer" not in result.stderr, result.stderr
    else:
        assert re.search(
            rf"planted\.cu:\d+.*({expected})|({expected})(.|\n)*planted\.cu:\d+", result.stderr
        ), result.stderr


# ---- Counters ----------------------------------------------------------------------------------------------


def total(kernels: Kernels, bug: str, traffic: str) -> tuple[int, int]:
    kernels.engine.reset_counters()
    with kernels.engine.options(counters=True):
        kernels.gemm(bug, m=128, n=64, depth=128)
    chosen = [counter for counter in kernels.engine.counters if counter.traffic == traffic]
    assert chosen and all(counter.site.startswith("planted.cu:") for counter in chosen)
    return sum(counter.cost for counter in chosen), sum(counter.ideal for counter in chosen)


def test_bank_conflicts(kernels):
    cost, ideal = total(kernels, "none", "ldmatrix")
    # 2 blocks, 4 warps, 4 steps of two halves, in each one b and four a fragments of 4 matrices
    assert cost == ideal == 2 * 4 * 4 * 2 * 5 * 4
    # Without the swizzle the eight rows of a matrix lie in two groups of banks.
    assert total(kernels, "no swizzle", "ldmatrix") == (4 * ideal, ideal)


def test_sectors(kernels):
    loaded = 2 * 4 * (64 + 64) * 64  # bytes: blocks, steps, rows of both tiles, bytes of a row
    assert total(kernels, "none", "cp.async load") == (loaded // 32, loaded // 32)
    # A fragment's two neighbours are stored one after the other: half of every sector is wasted each time.
    cost, ideal = total(kernels, "none", "global store")
    assert cost == 2 * ideal


# ---- Wrappers ----------------------------------------------------------------------------------------------


def test_product_through_the_whole_pipeline(kernels_anywhere):
    d, report = kernels_anywhere.gemm()
    assert report == ""
    assert torch.equal(d, product())


def test_tf32_product(kernels_anywhere):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)

    def rounded(x: torch.Tensor) -> torch.Tensor:  # to 10 bits, ties away from zero
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    d, report = kernels_anywhere.tf32_product(a, b)
    assert report == ""
    torch.testing.assert_close(d.double(), rounded(a).double() @ rounded(b).double(), rtol=1e-5, atol=1e-6)


def test_not_a_number_and_infinity_survive_rounding(kernels_anywhere):
    a, b = torch.zeros(16, 8), torch.ones(8, 8)
    a[0, 0] = (
        torch.tensor(0x7F800001).to(torch.int32).view(torch.float32)
    )  # a NaN in the bits that TF32 drops
    a[1, 0], a[2, 0] = float("inf"), -float("inf")
    d, report = kernels_anywhere.tf32_product(a, b)
    assert report == ""
    assert d[0].isnan().all()
    assert d[1].tolist() == [float("inf")] * 8
    assert d[2].tolist() == [-float("inf")] * 8
    assert not d[3:].any()


# ---- Operators ---------------------------------------------------------------------------------------------


@pytest.fixture
def operators() -> Engine:
    try:
        return torch_engine()
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_operators_are_led_to_the_emulated_kernels(operators):
    from cuda_cnn import functional as F

    x = torch.randn(2, 16, 3, 3)
    operators.reset_counters()
    with emulated(counters=True, bounds=True):
        y = F.local_response_norm(x, 5)
    assert any(counter.traffic == "global store" for counter in operators.counters)
    torch.testing.assert_close(y, torch.nn.functional.local_response_norm(x, 5))
    operators.reset_counters()
    F.local_response_norm(x, 5)
    assert operators.counters == []


NO_KERNEL_IMAGE, INVALID_FUNCTION = 209, 98


@pytest.mark.parametrize("gpu,code", [(1, NO_KERNEL_IMAGE), (2, INVALID_FUNCTION), (64, NO_KERNEL_IMAGE)])
def test_a_gpu_that_the_build_does_not_hold_is_named_before_any_launch(operators, gpu, code):
    from cuda_cnn import functional as F

    x = torch.randn(2, 16, 3, 3)
    text = r"this GPU is sm_75; the build holds .*\. Rebuild with TORCH_CUDA_ARCH_LIST=7\.5"
    operators.reset_counters()
    for _ in range(2):
        with emulated(gpu=gpu, attributes_error=code, counters=True), pytest.raises(RuntimeError, match=text):
            F.local_response_norm(x, 5)
    assert operators.counters == []


def test_a_gpu_is_asked_once(operators):
    from cuda_cnn import functional as F

    x = torch.randn(2, 16, 3, 3)
    with (
        emulated(gpu=3, attributes_error=9),
        pytest.raises(RuntimeError, match="kernels on the GPU: invalid"),
    ):
        F.local_response_norm(x, 5)
    for error in (0, NO_KERNEL_IMAGE):
        with emulated(gpu=3, attributes_error=error):
            F.local_response_norm(x, 5)
    with emulated(gpu=4, attributes_error=NO_KERNEL_IMAGE), pytest.raises(RuntimeError, match="this GPU"):
        F.local_response_norm(x, 5)


def test_a_launch_that_fails_is_an_error(operators):
    from cuda_cnn import functional as F

    with emulated(launch_error=9), pytest.raises(RuntimeError, match="kernel launch: invalid configuration"):
        F.local_response_norm(torch.randn(2, 16, 3, 3), 5)


def test_memory_starts_as_not_a_number(operators):
    """So what a kernel does not write cannot be right by luck."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.bfloat16).isnan().all()
    assert not torch.zeros(1000).any()


def test_an_access_outside_of_every_tensor_is_an_error(operators):
    outside = torch.from_numpy(np.ones((1, 4, 2, 2), dtype=np.float32))  # memory of another's allocator
    operator = (
        torch.ops.cuda_cnn_emulated.local_response_norm
    )  # without telling the emulator about its arguments
    with (
        operators.options(bounds=True),
        pytest.raises(RuntimeError, match=r"global read .* outside every tensor"),
    ):
        operator(outside, 3, 1.0, 0.75, 1.0)
    assert operator(outside, 3, 1.0, 0.75, 1.0).isfinite().all()
