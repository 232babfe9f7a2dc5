"""Builds cuda_cnn._C from csrc. What is built and why is decided in build_config.py; CONTRIBUTING.md explains.

A file of csrc/cpu in namespace cpu::CUDA_CNN_ISA is compiled once for each instruction set of ISA_TARGETS, and
the variant is chosen at run time. Neither -std= (torch passes the one that its headers need) nor -march= (one binary
serves all).
"""

import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip's build frontend leaves it out
import build_config  # noqa: E402

CSRC = ROOT / "csrc"
# A target pragma ahead of every include gives the code that -m flags would. A further set is one more
# row here and in csrc/cpu/isa.h.
ISA_TARGETS = {
    "baseline": "",
    "avx2": "avx2,fma,f16c,bmi,bmi2",
    "avx512": "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2",
}
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "dist_info", "editable_wheel", "install"}


ISA_UNIT = """\
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("{target}"))), apply_to = function)
#else
#pragma GCC target("{target}")
#endif
{unit}\
#if defined(__clang__)
#pragma clang attribute pop
#endif
"""


def instruction_sets() -> list[str]:
    return list(ISA_TARGETS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def write_if_changed(path: Path, text: str) -> None:
    """An unchanged file keeps its time stamp, so that ninja does not compile it again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def isa_unit(source: Path, isa: str, emulate: bool) -> str:
    """Writes build/isa/cpu/<source>_<isa>.cpp; returns its path from ROOT."""
    relative = source.relative_to(CSRC)
    unit = Path("build", "isa", relative.with_name(f"{source.stem}_{isa}.cpp"))
    target, text = ISA_TARGETS[isa], f'#include "{relative.as_posix()}"\n'
    if emulate and isa == "avx512":
        unit = unit.with_name(f"{source.stem}_emulated_{isa}.cpp")
        target = ISA_TARGETS["avx2"]
        text = '#include "../tests/emulation/include/avx512_by_avx2.h"\n' + text
    text = f"#define CUDA_CNN_ISA {isa}\n#define CUDA_CNN_ISA_{isa.upper()} 1\n" + text
    write_if_changed(ROOT / unit, ISA_UNIT.format(target=target, unit=text) if target else text)
    return str(unit)


def united(folder: str) -> str:
    """One unit of a folder's files: their torch headers take longer to read than they to compile. What they keep in
    anonymous namespaces must differ by name."""
    unit = Path("build", "united", f"{folder}.cpp")
    files = sorted((CSRC / folder).glob("*.cpp"))
    write_if_changed(ROOT / unit, "".join(f'#include "{folder}/{p.name}"\n' for p in files))
    return str(unit)


def sources(isas: list[str], cuda: bool, emulate: bool) -> list[str]:
    cpu = sorted(CSRC.glob("cpu/**/*.cpp"))
    variants = [p for p in cpu if "namespace cuda_cnn::cpu::CUDA_CNN_ISA" in p.read_text()]
    once = [p for p in cpu if p not in variants]
    once += [p for folder in (".", "ops") for p in sorted((CSRC / folder).glob("*.cpp"))]
    once += sorted(CSRC.glob("cuda/**/*.cu")) if cuda else []
    units = [isa_unit(p, isa, emulate) for p in variants for isa in isas]
    return [united("autograd"), *(str(p.relative_to(ROOT)) for p in once), *units]


def compile_flags(knobs: build_config.Knobs) -> dict[str, list[str]]:
    cxx = ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
    nvcc = ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-lineinfo"]
    if knobs.sanitize:
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        cxx += ["-fno-sanitize-recover=undefined"]
    elif knobs.debug:
        cxx += ["-O0", "-g"]
        nvcc += ["-g"]
    else:
        cxx += ["-O3", "-g0"]  # Python's own flags hold -g
    cxx += [
        "-Wno-psabi"
    ] * knobs.emulate_avx512  # how a vector is passed: every function that takes one is inlined
    return {"cxx": cxx, "nvcc": nvcc}


def extension(decision: build_config.Decision, knobs: build_config.Knobs, isas: list[str]) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    macros = [("CUDA_CNN_X86_VARIANTS", "1")] if len(isas) > 1 else []
    macros += [("CUDA_CNN_WITH_CUDA", "1")] if decision.cuda else []
    macros += [("CUDA_CNN_EMULATE_AVX512", "1")] if knobs.emulate_avx512 else []
    cudart = build_config.cudart_folder(decision.nvcc, ROOT / "build" / "cuda")
    return (CUDAExtension if decision.cuda else CppExtension)(
        "cuda_cnn._C",
        sources(isas, decision.cuda, knobs.emulate_avx512),
        include_dirs=[str(CSRC)],
        library_dirs=cudart,
        depends=[str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*")) if p.is_file()],
        define_macros=macros,
        extra_compile_args=compile_flags(knobs),
        extra_link_args=["-fsanitize=address,undefined"] if knobs.sanitize else [],
    )


def build_command(info: dict, variant: str) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects outlive the command (pip would put them in a temporary folder), one folder for each torch.
            tag = f"{sys.implementation.cache_tag}-torch{info['torch']}{variant}"
            self.build_temp = str(ROOT / "build" / f"temp-{tag}")

        def run(self) -> None:
            super().run()
            package = CSRC.parent / "cuda_cnn" if self.inplace else Path(self.build_lib) / "cuda_cnn"
            suffix = Path(sysconfig.get_config_var("EXT_SUFFIX")).stem
            info["version"] = self.distribution.get_version()
            (package / f"_build_info{suffix}.json").write_text(json.dumps(info, indent=2) + "\n")

    return Build


def main() -> None:
    if int(__version__.split(".")[0]) < 77:
        raise SystemExit(f"\ncuda_cnn: {build_config.OLD_SETUPTOOLS.format(found=__version__)}\n")
    if not BUILD_COMMANDS & set(sys.argv):  # sdist and the like compile nothing
        setup(ext_modules=[Extension("cuda_cnn._C", [])], cmdclass={"build_ext": build_ext})
        return
    knobs = build_config.Knobs.read(os.environ)
    facts = build_config.find_facts(knobs)
    decision = build_config.decide(facts, knobs)
    if decision.error:
        raise SystemExit(f"\ncuda_cnn: {decision.error}\n")
    for note in decision.notes:
        print(f"cuda_cnn: {note}", flush=True)
    os.environ["MAX_JOBS"] = str(decision.jobs)
    os.environ["PATH"] = os.pathsep.join(
        [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    )  # ninja's
    if decision.nvcc:  # before torch.utils.cpp_extension is imported, which reads them
        os.environ.update(CUDA_HOME=decision.nvcc.home, TORCH_CUDA_ARCH_LIST=decision.architectures)
    isas = instruction_sets()
    variant = (
        f"-{Path(knobs.cxx).name}"
        + "-cuda" * decision.cuda
        + "-sanitize" * knobs.sanitize
        + "-debug" * knobs.debug
        + "-emulated" * knobs.emulate_avx512
    )
    info = build_config.record(facts, decision, isas, ROOT)
    setup(
        ext_modules=[extension(decision, knobs, isas)], cmdclass={"build_ext": build_command(info, variant)}
    )


main()
