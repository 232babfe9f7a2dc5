"""A build with CUDA, seen without a GPU: its operators, the code that it holds, and what its sources never call."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cuda_cnn  # noqa: F401  (registers the operators)
from cuda_cnn import _C
from cuda_cnn._build_info import build_info

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("cuda_cnn::")
    and any("Tensor" in str(a.type) for a in torch._C._get_schema(*name.partition(".")[::2]).arguments)
)
with_cuda = pytest.mark.skipif(not _C.with_cuda, reason="a build without CUDA")


def test_there_are_operators():
    assert {f"cuda_cnn::{name}" for name in ("conv2d", "max_pool2d", "concat", "batch_norm")} <= set(
        OPERATORS
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_takes_cuda_tensors(name):
    """In a build without CUDA too, where the kernel behind this key says so."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump") or shutil.which(inside)


def cuda_files() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").rglob("*.cu"))


@with_cuda
def test_binary_holds_every_file_for_every_architecture():
    tool = find_cuobjdump()
    if tool is None or not cuda_files():
        pytest.skip("needs cuobjdump and the sources")
    command = [tool, "--list-elf", _C.__file__]
    held = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = build_info()["architectures"].replace(" ", ";").split(";")
    for architecture in (re.sub(r"\D", "", name) for name in names):  # the tool leaves out the "a" of 9.0a
        for file in cuda_files():
            pattern = rf"(^|\.){file.stem}\.(\d+\.)?sm_{architecture}a?\.cubin$"
            assert any(re.search(pattern, name) for name in held), (file, architecture, held)


@with_cuda
def test_explain_names_the_kernels():
    """Of tensors on a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cuda_cnn.explain import _algorithm

    with FakeTensorMode():
        x, weight = (torch.empty(*shape, device="cuda") for shape in ((2, 6, 14, 14), (16, 6, 5, 5)))
        names, reason = _algorithm("conv2d", (x, weight, None, [1, 1], [0, 0], [1, 1], 1), x)
    assert names == "few_channels/few_channels/few_channels" and "mostly empty" in reason


FORBIDDEN = (
    r"cuda(Malloc|Free|Memcpy)\w*|cuda(Device|Stream|Event)Synchronize|<<<|__shared__|\basm\b|atomic\w+\("
)
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*cuda/**/*") if path.suffix)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_synchronisation_allocation_or_atomics(path):
    """Memory comes from torch's allocator, nothing waits, nothing depends on the order of threads."""
    code = re.sub(r"//.*", "", (ROOT / path).read_text())
    found = {match.group() for match in re.finditer(FORBIDDEN, code)}
    allowed = {"ptx.cuh": {"asm"}, "launch.cuh": {"__shared__"}}.get(path.name, set())
    assert found <= allowed
