"""What setup.py builds, and why: `decide` is a pure function of what `find_facts` found and of the knobs.

Never asks torch.cuda.is_available(): a machine without a GPU (a docker build) compiles the CUDA kernels too.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NO_TORCH = (
    "cuda_cnn compiles against the PyTorch you already have, and pip's isolated build hides it. "
    "Run: pip install --no-build-isolation -v ."
)
OLD_SETUPTOOLS = (
    "setuptools 77 or newer is needed, {found} is installed. "
    "Run: pip install -U 'setuptools>=77,<82' wheel ninja"
)
NO_COMPILER = (
    "no C++ compiler was found (looked for {looked_for}). Install one: `apt-get install g++` (Debian, Ubuntu), "
    "`dnf install gcc-c++` (Fedora, RHEL), `xcode-select --install` (macOS), or name yours in CXX."
)
NO_NVCC = (
    "torch {torch} is built with CUDA {cuda}{gpus}, but no nvcc was found. Three ways out: "
    '(1) pip install "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]=={cuda}.*"; '
    "(2) a CUDA {major} toolkit, or a -devel image, with CUDA_HOME naming it; "
    "(3) CUDA_CNN_CUDA=0 for the CPU kernels alone."
)
# sm_80's code also runs on 8.6 and 8.9, its PTX on everything newer; Hopper has kernels of its own.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Nvcc:
    home: str
    version: str  # "13.0"
    architectures: tuple[str, ...] = ()  # ("80", "90", …), what this compiler knows

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


@dataclass(frozen=True)
class Facts:
    torch: str | None  # version, or None where it cannot be imported
    torch_cuda: str | None = None
    nvccs: tuple[Nvcc, ...] = ()  # in the order in which they were found
    gpus: tuple[tuple[int, int], ...] = ()  # compute capabilities
    compiler: str | None = "c++"
    cores: int = 1
    memory_gib: float = 64.0


@dataclass(frozen=True)
class Knobs:
    cuda: str = "auto"  # auto, 1, 0
    architectures: str = ""
    jobs: int | None = None
    debug: bool = False
    sanitize: bool = False
    emulate_avx512: bool = False  # for tests on a processor without it; slow
    cxx: str = "c++"

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Knobs:
        cuda = env.get("CUDA_CNN_CUDA", "").lower() or ("1" if _on(env.get("FORCE_CUDA")) else "auto")
        if cuda not in ("auto", "1", "0"):
            raise SystemExit(f"CUDA_CNN_CUDA is {cuda!r}: expected auto, 1 or 0")
        architectures = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
        jobs = env.get("MAX_JOBS", "")
        return cls(
            cuda=cuda,
            architectures="" if architectures == "native" else architectures,
            jobs=int(jobs) if jobs.isdigit() and int(jobs) > 0 else None,
            debug=_on(env.get("CUDA_CNN_DEBUG")),
            sanitize=_on(env.get("CUDA_CNN_SANITIZE")),
            emulate_avx512=_on(env.get("CUDA_CNN_EMULATE_AVX512")),
            cxx=env.get("CXX", "c++"),
        )


@dataclass(frozen=True)
class Decision:
    cuda: bool = False
    why: str = ""  # one line for _build_info and `python -m cuda_cnn env`
    nvcc: Nvcc | None = None
    architectures: str = ""
    jobs: int = 1
    notes: tuple[str, ...] = ()
    error: str | None = field(default=None)


def _on(value: str | None) -> bool:
    return (value or "").lower() in ("1", "on", "yes", "true")


def decide(facts: Facts, knobs: Knobs) -> Decision:
    if facts.torch is None:
        return Decision(error=NO_TORCH)
    if facts.compiler is None:
        return Decision(error=NO_COMPILER.format(looked_for=knobs.cxx))
    if knobs.cuda == "0":
        return _cpu_only(facts, knobs, "CUDA_CNN_CUDA=0")
    if facts.torch_cuda is None:
        return _decide_cpu_torch(facts, knobs)
    major = facts.torch_cuda.split(".")[0]
    if not facts.nvccs:
        gpus = " and sees " + ", ".join(f"sm_{a}{b}" for a, b in facts.gpus) if facts.gpus else ""
        text = NO_NVCC.format(torch=facts.torch, cuda=facts.torch_cuda, major=major, gpus=gpus)
        if facts.gpus or knobs.cuda == "1":
            return Decision(error=text)
        return _cpu_only(facts, knobs, "no nvcc", text)
    nvcc = facts.nvccs[0]
    if nvcc.major != major:
        return Decision(error=_major_mismatch(facts, nvcc, major))
    return _with_cuda(facts, knobs, nvcc)


def _cpu_only(facts: Facts, knobs: Knobs, why: str, note: str = "") -> Decision:
    notes = ("CPU kernels only: " + (note or why),)
    return Decision(why=why, jobs=jobs(facts, knobs, cuda=False), notes=notes)


def _decide_cpu_torch(facts: Facts, knobs: Knobs) -> Decision:
    found = "the nvcc found is not used" if facts.nvccs else "no CUDA kernel can be built"
    why = f"torch {facts.torch} has no CUDA, so {found}"
    remedy = (
        "To use it, install a CUDA build of torch"
        if facts.nvccs
        else "Install a CUDA build of torch for them"
    )
    if knobs.cuda == "1":
        return Decision(error=f"CUDA_CNN_CUDA=1, but {why}. {remedy}, or drop CUDA_CNN_CUDA=1.")
    return _cpu_only(facts, knobs, why, f"{why}. {remedy}.")


def _major_mismatch(facts: Facts, nvcc: Nvcc, major: str) -> str:
    text = (
        f"nvcc {nvcc.version} ({nvcc.home}) cannot build for torch {facts.torch}, "
        f"which is built with CUDA {facts.torch_cuda}. "
    )
    fitting = [other for other in facts.nvccs if other.major == major]
    if fitting:
        return (
            text
            + f"Another toolkit here matches: CUDA_HOME={fitting[0].home} pip install --no-build-isolation -v ."
        )
    return text + (
        f"Install a CUDA {major} toolkit and name it in CUDA_HOME, or a torch built with CUDA {nvcc.major}, "
        "or build the CPU kernels alone with CUDA_CNN_CUDA=0."
    )


def _with_cuda(facts: Facts, knobs: Knobs, nvcc: Nvcc) -> Decision:
    chosen = architectures(facts, knobs, nvcc)
    count = jobs(facts, knobs, cuda=True)
    notes = [f"CPU and CUDA kernels: nvcc {nvcc.version} ({nvcc.home}), architectures {chosen}, {count} jobs"]
    if nvcc.version != facts.torch_cuda:
        notes.append(
            f"warning: nvcc is {nvcc.version} and torch's CUDA {facts.torch_cuda}: the same major version, so this "
            "should work; if a symbol is missing, install the same minor version"
        )
    if re.search(r"\b9\.0(?!a)", chosen):
        notes.append("warning: 9.0 leaves out Hopper's own kernels (wgmma, TMA): 9.0a has them")
    why = f"nvcc {nvcc.version} and torch's CUDA {facts.torch_cuda}"
    return Decision(cuda=True, why=why, nvcc=nvcc, architectures=chosen, jobs=count, notes=tuple(notes))


def architectures(facts: Facts, knobs: Knobs, nvcc: Nvcc) -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs, else the default list with PTX."""
    if knobs.architectures:
        return knobs.architectures
    out = []
    for capability in sorted(set(facts.gpus)):
        name = "{}.{}".format(*capability)
        known = not nvcc.architectures or name.replace(".", "") in nvcc.architectures
        if capability >= OLDEST_CAPABILITY:
            out.append("9.0a" if capability == (9, 0) else name if known else "8.0+PTX")
    return ";".join(dict.fromkeys(out)) or DEFAULT_ARCHITECTURES


def jobs(facts: Facts, knobs: Knobs, cuda: bool) -> int:
    """MAX_JOBS, else as many compilers as there are cores and as fit into memory (nvcc takes about 4 GiB, g++ 2)."""
    if knobs.jobs:
        return knobs.jobs
    return max(1, min(facts.cores, int(facts.memory_gib // (4 if cuda else 2))))


# ---- What this machine has ------------------------------------------------------------------------------


def find_facts(knobs: Knobs, env: Mapping[str, str] = os.environ) -> Facts:
    try:
        import torch
    except ImportError:
        return Facts(torch=None)
    nvccs = [nvcc for nvcc in map(_nvcc, _cuda_homes(env, torch.version.cuda)) if nvcc]
    gpus = []
    if torch.version.cuda:
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return Facts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        nvccs=tuple(nvccs),
        gpus=tuple(gpus),
        compiler=shutil.which(knobs.cxx.split()[-1]) and knobs.cxx,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
    )


def _cuda_homes(env: Mapping[str, str], torch_cuda: str | None) -> list[str]:
    """CUDA_HOME or CUDA_PATH → cuda.pathfinder → PATH → /usr/local/cuda*, torch's major version first."""
    return list(dict.fromkeys(os.path.realpath(home) for home in _cuda_home_candidates(env, torch_cuda)))


def _cuda_home_candidates(env: Mapping[str, str], torch_cuda: str | None) -> Iterator[str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            yield env[name]
    try:
        from cuda.pathfinder import find_nvidia_binary_utility

        if path := find_nvidia_binary_utility("nvcc"):
            yield str(Path(path).resolve().parents[1])
    except (ImportError, RuntimeError, OSError):
        pass
    if path := shutil.which("nvcc", path=env.get("PATH")):
        yield _toolkit_of(path)
    major = (torch_cuda or "").split(".")[0]
    installed = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    yield from map(str, sorted(installed, key=lambda p: not re.match(rf"cuda-{major}\b", p.name)))


def _toolkit_of(nvcc: str) -> str:
    """The toolkit's folder. An nvcc on PATH may be a wrapper outside of it: then nvcc itself tells."""
    home = Path(nvcc).resolve().parents[1]
    if not (home / "include" / "cuda_runtime.h").is_file():
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        if top := re.search(r"TOP=(\S+)", dry_run):
            home = Path(top.group(1)).resolve()
    return str(home)


def _nvcc(home: str) -> Nvcc | None:
    path = Path(home) / "bin" / "nvcc"
    if not path.is_file():
        return None
    version = re.search(r"release (\d+\.\d+)", _output([str(path), "--version"]))
    known = re.findall(r"sm_(\d+)", _output([str(path), "--list-gpu-code"]))
    return Nvcc(home, version.group(1), tuple(known)) if version else None


def cudart_folder(nvcc: Nvcc | None, links: Path) -> list[str]:
    """Where the linker finds libcudart.so. pip's toolkit has only libcudart.so.13: a link in `links` names it."""
    folders = [Path(nvcc.home) / name for name in ("lib64", "lib")] if nvcc else []
    for folder in folders:
        if (folder / "libcudart.so").exists():
            return [str(folder)]
    for library in (library for folder in folders for library in sorted(folder.glob("libcudart.so.*"))):
        links.mkdir(parents=True, exist_ok=True)
        (links / "libcudart.so").unlink(missing_ok=True)
        (links / "libcudart.so").symlink_to(library)
        return [str(links)]
    return []


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _memory_gib() -> float:
    """Memory that is free now, or the container's limit where that is less."""
    limits = [64.0]
    try:
        limits.append(
            int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 2**20
        )
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    except (OSError, ValueError, AttributeError):
        pass
    return min(limits)


def compiler_version(compiler: str) -> str:
    return (_output([*compiler.split(), "--version"]).splitlines() or ["unknown"])[0]


def commit(root: Path) -> str:
    return (
        _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]).strip()
        or "unknown"
    )


def record(facts: Facts, decision: Decision, instruction_sets: list[str], root: Path) -> dict:
    """What stays beside the binary, since pip hides what a build prints."""
    return {
        "torch": facts.torch,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))),
        "commit": commit(root),
        "compiler": compiler_version(facts.compiler or ""),
        "instruction_sets": instruction_sets,
        "cuda": decision.cuda,
        "why": decision.why,
        "nvcc": decision.nvcc.version if decision.nvcc else None,
        "architectures": decision.architectures,
        "notes": list(decision.notes),
    }


if __name__ == "__main__":  # `python build_config.py` shows what would be built here
    knobs_here = Knobs.read(os.environ)
    facts_here = find_facts(knobs_here)
    print(facts_here, knobs_here, decide(facts_here, knobs_here), sep="\n", file=sys.stdout)
