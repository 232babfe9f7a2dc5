"""Builds the extension module cuda_cnn._C."""

import platform
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
COMPILED_ONCE = {"parallel.cpp", "workspace.cpp", "isa.cpp"}
ISA_TARGETS = {
    "baseline": "",
    "avx2": "avx2,fma,f16c,bmi,bmi2",
    "avx512": "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2",
}


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def isa_sources(kernels: list, isas: list) -> list:
    """One translation unit for each CPU kernel file and instruction set."""
    out = []
    for source in kernels:
        for isa in isas:
            relative = source.relative_to(ROOT / "csrc")
            name = "_".join(relative.relative_to("cpu").with_suffix("").parts)
            target = f'#pragma GCC target("{ISA_TARGETS[isa]}")\n' if ISA_TARGETS[isa] else ""
            text = f"{target}#define CUDA_CNN_ISA {isa}\n#define CUDA_CNN_ISA_{isa.upper()} 1\n"
            unit = Path("build") / "isa" / f"{name}_{isa}.cpp"
            write_if_changed(ROOT / unit, text + f'#include "{relative.as_posix()}"\n')
            out.append(str(unit))
    return out


x86 = platform.machine().lower() in ("x86_64", "amd64")
cpu = sorted((ROOT / "csrc/cpu").rglob("*.cpp"))
kernels = [p for p in cpu if p.name not in COMPILED_ONCE]
plain = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc/ops").rglob("*.cpp"))
plain += [p for p in cpu if p.name in COMPILED_ONCE]
sources = [str(p.relative_to(ROOT)) for p in plain] + isa_sources(kernels, list(ISA_TARGETS) if x86 else ["baseline"])
flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
setup(
    ext_modules=[
        CppExtension(
            "cuda_cnn._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("CUDA_CNN_X86_VARIANTS", "1")] if x86 else [],
            extra_compile_args={"cxx": flags},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
