#!/usr/bin/env python3
"""Compiles csrc/cuda/**/*.cu for sm_80, sm_90a and the newest architecture nvcc knows, and judges the code.

    .ci/cuda_compile.py [--arch sm_80 …] [--verbose] [name …]      name: a part of the files' names

Fails on a compile error, a register spill or a stack frame, ptxas' C75xx remarks (wgmma serialised), shared
memory outside of the dynamic pool, a register budget exceeded, and, where a disassembler is found, on local
memory accesses and on tensor-core kernels whose main loop lacks the instructions that it is made for.
Needs no GPU; without nvcc it says so and succeeds.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "cuda_compile"
ARCHITECTURES = ["sm_80", "sm_90a", "newest"]

# Registers a thread, by the first pattern found in a kernel's name. A multiprocessor has 65536: with 255 a
# thread two blocks of 128 threads fit, with 128 four.
BUDGETS = [(r"TensorCoreProduct|FmaProduct", 255), (r"", 128)]

# What the main loop of a kernel must hold, by the first pattern found: the least share of tensor-core
# products, and what else has to be there. sm_80 takes 8 cycles for a product: with more than 1 in 8
# instructions the tensor cores are the limit, and two blocks share the issue slots. The small tiles are for
# layers that fill no card. There is no ldmatrix that transposes 32-bit elements.
MAIN_LOOPS = [
    (r"^correlate<TensorCoreProduct<[BH].* 128, 128>, \(Load\)0", 1 / 4, ["LDSM", "LDGSTS"]),
    (r"^weight_gradient<TensorCoreProduct<[BH].* 128, 128>, \(Load\)0", 1 / 4, ["LDSM", "LDGSTS"]),
    (r"^correlate<TensorCoreProduct<float.* 128, 128>, \(Load\)0", 1 / 6, ["LDSM", "LDGSTS"]),
    (r"^weight_gradient<TensorCoreProduct<float.*, \(Load\)0", 1 / 20, ["LDGSTS"]),
    (r"TensorCoreProduct<[BH].*, \(Load\)0", 1 / 10, ["LDSM", "LDGSTS"]),
    (r"TensorCoreProduct<.*, \(Load\)0", 1 / 14, ["LDSM", "LDGSTS"]),
    (r"TensorCoreProduct<", 0, []),
]


@dataclass
class Kernel:
    name: str
    registers: int = 0
    complaints: list[str] = field(default_factory=list)
    loop: str = ""  # what the main loop holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--verbose", action="store_true", help="every kernel, not only the bad ones")
    parser.add_argument("names", nargs="*", help="compile only files whose path holds one of these")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_compile: skipped, no nvcc on this machine")
        return 0
    sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    sources = [s for s in sources if not options.names or any(name in str(s) for name in options.names)]
    disassembler = find_cuobjdump(nvcc)
    if disassembler is None:
        print(
            "cuda_compile: no cuobjdump (it is in the CUDA toolkit and in triton): machine code is not read"
        )
    architectures = [newest(nvcc) if name == "newest" else name for name in options.arch]
    jobs = [(source, architecture) for architecture in dict.fromkeys(architectures) for source in sources]
    failures = 0
    seen: list[str] = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        results = pool.map(lambda job: examine(nvcc, disassembler, *job), jobs)
        for (source, architecture), (kernels, errors) in zip(jobs, results):
            failures += show(source, architecture, kernels, errors, options.verbose)
            seen += [kernel.name for kernel in kernels]
    for pattern in [] if options.names else [pattern for pattern, *_ in MAIN_LOOPS + BUDGETS]:
        if not any(re.search(pattern, name) for name in seen):
            failures += 1
            print(f"    BAD no kernel has a name like {pattern}: this script is out of date")
    print(f"cuda_compile: {len(jobs)} compilations, {failures} complaints")
    return 1 if failures else 0


def show(source: Path, architecture: str, kernels: list[Kernel], errors: list[str], verbose: bool) -> int:
    complaints = [*errors, *(f"{kernel.name}: {text}" for kernel in kernels for text in kernel.complaints)]
    most = max((kernel.registers for kernel in kernels), default=0)
    print(
        f"{architecture:7} {source.relative_to(ROOT)}: {len(kernels)} kernels, at most {most} registers",
        flush=True,
    )
    for kernel in kernels if verbose else []:
        print(f"        {kernel.registers:3} {kernel.name} {kernel.loop}")
    for text in complaints:
        print(f"    BAD {text}")
    return len(complaints)


@functools.cache
def note_once(text: str) -> None:
    print(text)


# ---- Tools -----------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, or one inside a triton wheel (which finds nvdisasm beside itself): this environment's or the
    one that .ci/steps/10-cuda-build leaves behind."""
    candidates = [Path(nvcc).resolve().with_name("cuobjdump"), "cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    inside = "build/cuda-venv/lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump"
    candidates += sorted(ROOT.glob(inside))
    return next(filter(None, (shutil.which(str(path)) for path in candidates)), None)


def newest(nvcc: str) -> str:
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return "sm_" + max(re.findall(r"compute_(\d+)", known), key=int)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def demangle(text: str) -> str:
    """Readable, without the namespaces; an enum's value as (Type)0."""
    if shutil.which("c++filt"):
        text = run(["c++filt"], input=text).stdout
    text = text.replace("(anonymous namespace)::", "")
    return re.sub(r"\b(?:cuda_cnn|cuda|conv2d|_INTERNAL_\w+)::", "", text)


# ---- One file for one architecture -----------------------------------------------------------------------


def examine(nvcc: str, disassembler: str | None, source: Path, arch: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of a file, with complaints, and what is wrong with the file as a whole."""
    name = "_".join(source.relative_to(ROOT / "csrc/cuda").with_suffix("").parts)
    target = OUTPUT / f"{name}.{arch}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"-arch={arch}", "-I", str(ROOT / "csrc"), "-Xptxas", "-v"]
    compiled = run([nvcc, *flags, "-c", str(source), "-o", str(target)])
    if compiled.returncode:
        return [], ["does not compile:\n" + compiled.stderr[-4000:]]
    errors = [line for line in compiled.stderr.splitlines() if re.search(r"\bC75\d\d\b", line)]
    kernels = {kernel.name: kernel for kernel in map(judge_resources, entries(compiled.stderr))}
    if disassembler is not None:
        path = f"{Path(disassembler).parent}{os.pathsep}{os.environ['PATH']}"  # for the nvdisasm beside it
        code = run([disassembler, "-sass", str(target)], env={**os.environ, "PATH": path})
        if "Cannot decode architecture" in code.stderr and arch not in ARCHITECTURES:
            note_once(f"cuda_compile: {disassembler} is older than {arch}: its machine code is not read")
        elif code.returncode:
            errors.append("cannot be disassembled: " + code.stderr[-400:].strip())
        for mangled, instructions in functions(code.stdout):
            kernel = kernels.get(title(demangle(mangled)))
            if kernel is not None:
                judge_code(kernel, instructions)
    return list(kernels.values()), errors


def title(demangled: str) -> str:
    """void f<T>(parameters) becomes f<T>."""
    text = demangled.strip().removeprefix("void ")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i]
    return text


def entries(ptxas: str) -> list[tuple[str, str]]:
    """Each kernel's name, and what ptxas says about it."""
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'", ptxas)
    return [(title(demangle(name)), text) for name, text in zip(parts[1::2], parts[2::2])]


def judge_resources(entry: tuple[str, str]) -> Kernel:
    name, text = entry
    kernel = Kernel(name, registers=int(re.search(r"Used (\d+) registers", text).group(1)))
    budget = next(limit for pattern, limit in BUDGETS if re.search(pattern, name))
    if kernel.registers > budget:
        kernel.complaints.append(f"{kernel.registers} registers, the budget is {budget}")
    stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+).*?, (\d+)", text).groups())
    if stack or stores or loads:
        kernel.complaints.append(f"stack frame of {stack} bytes, spills of {stores} and {loads} bytes")
    if shared := re.search(r"(\d+) bytes smem", text):
        kernel.complaints.append(f"{shared.group(1)} bytes of static shared memory")
    return kernel


# ---- Machine code ----------------------------------------------------------------------------------------

Instruction = tuple[int, str, str]  # address, opcode, operands


def functions(sass: str) -> list[tuple[str, list[Instruction]]]:
    parts = re.split(r"Function : (\w+)", sass)
    line = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
    return [
        (name, [(int(address, 16), opcode, operands) for address, opcode, operands in line.findall(text)])
        for name, text in zip(parts[1::2], parts[2::2])
    ]


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Of the loops (backward branches) that hold the most HMMA, the shortest."""
    best: tuple[int, int] = (0, 0)
    loop: list[Instruction] = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if not opcode.startswith("BRA") or not target or int(target.group(1), 16) >= address:
            continue
        body = [i for i in instructions if int(target.group(1), 16) <= i[0] <= address]
        products = sum(i[1].startswith("HMMA") for i in body)
        if products and (products, -len(body)) > best:
            best, loop = (products, -len(body)), body
    return loop


def judge_code(kernel: Kernel, instructions: list[Instruction]) -> None:
    local = {opcode for _, opcode, _ in instructions if opcode.startswith(("LDL", "STL"))}
    if local:
        kernel.complaints.append(f"local memory: {', '.join(sorted(local))}")
    rule = next((rule for rule in MAIN_LOOPS if re.search(rule[0], kernel.name)), None)
    if rule is None:
        return
    _, least, needed = rule
    loop = main_loop(instructions)
    count = {name: sum(i[1].startswith(name) for i in loop) for name in ("HMMA", "LDSM", "LDGSTS")}
    kernel.loop = f"loop of {len(loop)}: " + ", ".join(f"{n} {name}" for name, n in count.items())
    if not loop or count["HMMA"] < least * len(loop):
        kernel.complaints.append(
            f"{count['HMMA']} HMMA in a main loop of {len(loop)}, expected {least:.1%} or more"
        )
    kernel.complaints += [f"no {name} in the main loop" for name in needed if not count[name]]


if __name__ == "__main__":
    sys.exit(main())
