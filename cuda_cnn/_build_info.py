"""What setup.py recorded beside the binary, and whether that binary fits the torch that is running."""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

REBUILD = "pip install --no-build-isolation -v -e ."  # in the source folder
_SUFFIX = Path(sysconfig.get_config_var("EXT_SUFFIX")).stem
_PACKAGE = Path(__file__).resolve().parent


@cache
def build_info() -> dict[str, Any]:
    """The record of this interpreter's build: versions, date, CUDA or not and why, architectures, commit.

    Raises ImportError, saying how to build, where there is none.
    """
    path = _PACKAGE / f"_build_info{_SUFFIX}.json"
    if not path.is_file():
        raise ImportError(
            f"cuda_cnn has not been built for this Python (no {path.name} in {_PACKAGE}). "
            f"Build it in the source folder with: {REBUILD}"
        )
    return json.loads(path.read_text())


def torch_mismatch(built_with: str, running: str) -> str | None:
    """What is wrong when torch has changed since the build: its C++ interface has, too."""
    if built_with == running:
        return None
    return f"cuda_cnn was built with torch {built_with}, running {running}: rebuild with {REBUILD}"


def check_build() -> None:
    """Raises ImportError, ahead of an `undefined symbol`, when the binary is missing or not for this torch."""
    import torch

    problem = torch_mismatch(build_info()["torch"], str(torch.__version__))
    if problem:
        raise ImportError(problem)


def build_note(info: dict[str, Any]) -> str:
    """For the errors of the kernels: "cuda_cnn::conv2d was built without CUDA (…)", "the build holds …"."""
    return held_code(info["architectures"]) if info["cuda"] else f"{info['why']} when built on {info['date']}"


def _names(architectures: str) -> list[str]:
    return [name for name in architectures.replace(" ", ";").split(";") if name]


def held_code(architectures: str) -> str:
    """In words: "sm_80, sm_90a and no PTX". `architectures` is in TORCH_CUDA_ARCH_LIST's form."""
    names = _names(architectures)
    held = ", ".join("sm_" + name.removesuffix("+PTX").replace(".", "") for name in names)
    ptx = ", ".join(name.removesuffix("+PTX") for name in names if name.endswith("+PTX"))
    return f"{held or 'no architecture'} and {'PTX of ' + ptx if ptx else 'no PTX'}"


def missing_architecture(capability: tuple[int, int], architectures: str) -> str | None:
    """What is wrong when a GPU cannot run the binary, None when it can.

    `architectures` is in TORCH_CUDA_ARCH_LIST's form. Machine code runs on its own major version at the same or a
    later minor one; PTX on everything newer; an "a" architecture only on exactly its own.
    """
    if any(_runs(name, capability) for name in _names(architectures)):
        return None
    gpu = "{}.{}".format(*capability)
    return (
        f"this GPU is sm_{gpu.replace('.', '')}; the build holds {held_code(architectures)}. "
        f"Rebuild with TORCH_CUDA_ARCH_LIST={gpu}"
    )


def _runs(name: str, capability: tuple[int, int]) -> bool:
    number = name.removesuffix("+PTX")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    if name.endswith("+PTX") and (major, minor) <= capability:
        return True
    return major == capability[0] and minor <= capability[1]
