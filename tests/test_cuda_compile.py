"""The judge of compiled CUDA kernels, .ci/cuda_compile.py: what it must complain about, and what not."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def judge():
    path = ROOT / ".ci/cuda_compile.py"
    if not path.exists():
        pytest.skip("a source distribution without .ci")
    spec = importlib.util.spec_from_file_location("cuda_compile", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ptxas(registers=40, stack=0, stores=0, shared="") -> str:
    return (
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {stores} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers{shared}, 368 bytes cmem[0]\n"
    )


@pytest.mark.parametrize(
    "text,complaint",
    [
        (ptxas(), None),
        (ptxas(registers=129), "129 registers, the budget is 128"),
        (ptxas(stack=16, stores=8), "stack frame of 16 bytes, spills of 8 and 8 bytes"),
        (ptxas(stack=16), "stack frame of 16 bytes, spills of 0 and 0 bytes"),
        (ptxas(shared=", 4096 bytes smem"), "4096 bytes of static shared memory"),
    ],
)
def test_resources(judge, text, complaint):
    kernel = judge.judge_resources(("lrn_tile<float, true>", text))
    assert kernel.complaints == ([complaint] if complaint else [])


KERNEL = "correlate<TensorCoreProduct<BFloat16, ReductionRows<BFloat16>, 128, 128>, (Load)0>"


def machine_code(body: list[str]) -> str:
    """A function whose loop holds the instructions, in cuobjdump's form."""
    lines = ["MOV R1, c[0x0][0x28]", *body, "@P0 BRA 0x10", "EXIT", "BRA 0x500"]
    text = "".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    return "\t\tFunction : _Z1kv\n" + text


@pytest.mark.parametrize(
    "body,complaints",
    [
        (["HMMA.16816.F32.BF16 R4, R8, R10, R4", "LDSM.16.M88.4 R8, [R2]", "LDGSTS.E.128 [R3], [R6.64]"], []),
        (["HMMA.16816.F32 R4", "LDSM.16.M88.4 R8"], ["no LDGSTS in the main loop"]),
        (["HMMA.16816.F32 R4", "LDGSTS.E.128 R8"], ["no LDSM in the main loop"]),
        (
            ["HMMA.16816.F32 R4", "LDSM R8", "LDGSTS R8", *["IADD3 R1, R1, R2"] * 8],
            ["1 HMMA in a main loop of 12, expected 25.0% or more"],
        ),
        ([*["HMMA.16816.F32 R4"] * 2, "LDSM R8", "@!P1 LDGSTS R8", "STL [R1], R2"], ["local memory: STL"]),
        (
            ["FFMA R1, R2, R3, R1"],
            ["0 HMMA in a main loop of 0, expected 25.0% or more", *["no LDSM", "no LDGSTS"]],
        ),
    ],
)
def test_machine_code(judge, body, complaints):
    ((name, instructions),) = judge.functions(machine_code(body))
    assert name == "_Z1kv"
    kernel = judge.Kernel(KERNEL)
    judge.judge_code(kernel, instructions)
    assert [text.removesuffix(" in the main loop") for text in kernel.complaints] == [
        text.removesuffix(" in the main loop") for text in complaints
    ]


def test_compilation(judge, tmp_path, monkeypatch):
    nvcc = judge.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    monkeypatch.setattr(judge, "ROOT", tmp_path)
    monkeypatch.setattr(judge, "OUTPUT", tmp_path)
    source = tmp_path / "csrc/cuda/kernel.cu"
    source.parent.mkdir(parents=True)
    source.write_text(
        "__global__ void indexed(float* x, int i) { float a[64] = {}; a[i] = 1; a[i / 2] += 2; x[0] = a[i * 3]; }\n"
        "__global__ void fixed(float* x) { __shared__ float a[64]; a[threadIdx.x] = x[threadIdx.x]; x[0] = a[3]; }\n"
    )
    kernels, errors = judge.examine(nvcc, None, source, "sm_80")
    assert errors == []
    complaints = {kernel.name: kernel.complaints for kernel in kernels}
    assert complaints == {
        "indexed": ["stack frame of 256 bytes, spills of 0 and 0 bytes"],
        "fixed": ["256 bytes of static shared memory"],
    }
    source.write_text("__global__ void broken( {}\n")
    kernels, errors = judge.examine(nvcc, None, source, "sm_80")
    assert kernels == []
    assert len(errors) == 1 and "does not compile" in errors[0]
