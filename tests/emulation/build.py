"""Compiles kernels for the emulator, into build/emulated/: ninja runs g++ on what has changed."""

import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "emulated"

INCLUDES = [HERE / "include", ROOT / "csrc"]
COMMON = "-g1 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-math-errno -Wall -Wno-unknown-pragmas"
COMMON += " -DCUDA_CNN_EMULATED -D__CUDA_ARCH_LIST__=800,900"
FLAGS = {
    "engine": "-O2",
    # The instrumentation shows every load and store to engine/memory.cpp. Aggregates stay whole, so that a
    # 16-byte access is seen as one; locals start as garbage.
    "kernel": "-x c++ -O1 -fsanitize=thread -fno-tree-sra -ftrivial-auto-var-init=pattern",
    "torch": "-O1 -fvisibility=default",
}
# CUDA_CNN_SANITIZE=1: AddressSanitizer and UBSan in place of our own hooks. They see what our ranges of whole tensors
# do not: local arrays (registers), tables on the host, freed memory, shifts and overflows of index arithmetic.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
SANITIZED = {
    "engine": f"-O2 {SANITIZERS}",
    "kernel": f"-x c++ -O1 -ftrivial-auto-var-init=pattern -fno-omit-frame-pointer {SANITIZERS}",
    "torch": FLAGS["torch"],
}
RULES = """
rule compile
  command = {compiler} -MMD -MF $out.d {common} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared -Wl,-Bsymbolic $in -o $out $flags
"""


# The tests' own kernels: compiled together, for one copy of the engine.
KERNELS = [HERE / "kernels/planted.cu", ROOT / "tests/golden/kernels.cu"]


class Unavailable(Exception):  # noqa: N818
    """Why kernels cannot be compiled for the emulator here."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def ninja() -> str:
    if sys.platform != "linux":
        raise Unavailable(f"the emulator needs Linux, this is {sys.platform}")
    version = subprocess.run(
        [*compiler().split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    if version.returncode or "__clang__" in version.stdout or "__GNUC__" not in version.stdout:
        raise Unavailable(f"the emulator needs g++ (12 or newer), and {compiler()!r} is not")
    beside_python = Path(sys.executable).with_name("ninja")
    found = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    if found is None:
        raise Unavailable("the emulator is built with ninja: pip install ninja")
    return found


def sanitizer_runtime() -> str:
    """For LD_PRELOAD, where a sanitized library is loaded into a Python that is not."""
    names = ["libasan.so", "libubsan.so", "libstdc++.so"]
    command = [*compiler().split(), "-print-file-name="]
    return ":".join(
        subprocess.check_output([*command[:-1], command[-1] + name], text=True).strip() for name in names
    )


def build(
    name: str,
    kernels: list[Path],
    torch_sources: list[Path] = (),
    flags: str = "",
    sanitize: bool = os.environ.get("CUDA_CNN_SANITIZE") == "1",
) -> Path:
    """The shared library <name>.so of the engine, the kernels, and the sources that see tensors."""
    ninja()
    name += "-sanitized" * sanitize
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    sources = [(path, "engine") for path in sorted((HERE / "engine").glob("*.cpp"))]
    sources += [(path, "kernel") for path in kernels] + [(path, "torch") for path in torch_sources]
    library = folder / f"{name}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(_ninja_file(library, sources, flags, sanitize))
        jobs = os.environ.get("MAX_JOBS", "2")
        command = [ninja(), "--quiet", "-C", folder, "-j", jobs]
        # ninja keeps the lock, should this process be killed before it.
        result = subprocess.run(command, capture_output=True, text=True, pass_fds=[lock.fileno()])
    if result.returncode:
        raise RuntimeError(f"compiling {name} for the emulator failed:\n{result.stdout[-8000:]}")
    return library


def _ninja_file(library: Path, sources: list[tuple[Path, str]], flags: str, sanitize: bool) -> str:
    with_torch = any(kind == "torch" for _, kind in sources)
    text = RULES.format(
        compiler=compiler(), common=" ".join([_cpu_flags(), COMMON, flags, *(f"-I{p}" for p in INCLUDES)])
    )
    objects = []
    for path, kind in sources:
        objects.append("_".join([kind, *path.relative_to(ROOT).with_suffix(".o").parts[1:]]))
        own = (SANITIZED if sanitize else FLAGS)[kind] + (" " + _torch_flags() if kind == "torch" else "")
        text += f"build {objects[-1]}: compile {path}\n  flags = {own}\n"
    text += f"build {library.name}: link {' '.join(objects)}\n"
    return text + f"  flags = {_torch_link_flags() if with_torch else ''} {SANITIZERS if sanitize else ''}\n"


def _cpu_flags() -> str:
    """Fused multiply-add, as the device has it, where this processor can."""
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text().split():
        return ""
    return "-mavx2 -mfma"


def _torch_flags() -> str:
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = " ".join(f"-isystem {path}" for path in include_paths())
    return f"{includes} -D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"


def _torch_link_flags() -> str:
    from torch.utils.cpp_extension import library_paths

    return " ".join(f"-L{path} -Wl,-rpath,{path}" for path in library_paths()) + " -lc10 -ltorch_cpu -ltorch"
