"""The build's decision: every row of the table in CONTRIBUTING.md, as data. Nothing is compiled here."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cuda_cnn._build_info import build_note, missing_architecture, torch_mismatch

ROOT = Path(__file__).resolve().parents[1]


def load_build_config():
    spec = importlib.util.spec_from_file_location("build_config", ROOT / "build_config.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_config"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


config = load_build_config()
Facts, Knobs, Nvcc, decide = config.Facts, config.Knobs, config.Nvcc, config.decide

NVCC_13 = Nvcc("/opt/cuda-13.0", "13.0", ("80", "86", "90", "100", "120"))
NVCC_12 = Nvcc("/opt/cuda-12.8", "12.8", ("80", "86", "90"))
CUDA_TORCH = Facts(torch="2.13.0+cu130", torch_cuda="13.0", nvccs=(NVCC_13,), cores=8, memory_gib=64)
CPU_TORCH = Facts(torch="2.13.0+cpu", cores=8, memory_gib=64)


def facts(base=CUDA_TORCH, **changes):
    return dataclasses.replace(base, **changes)


def test_torch_not_importable():
    decision = decide(Facts(torch=None, compiler=None), Knobs())
    assert decision.error == (
        "cuda_cnn compiles against the PyTorch you already have, and pip's isolated build hides it. "
        "Run: pip install --no-build-isolation -v ."
    )


def test_nvcc_and_cuda_torch_of_one_major_build_cuda():
    decision = decide(CUDA_TORCH, Knobs())
    assert decision.error is None and decision.cuda and decision.nvcc == NVCC_13
    assert decision.notes == (
        "CPU and CUDA kernels: nvcc 13.0 (/opt/cuda-13.0), architectures 8.0+PTX;9.0a, 8 jobs",
    )


@pytest.mark.parametrize(
    ("gpus", "knob", "expected"),
    [
        ((), "", "8.0+PTX;9.0a"),
        (((8, 6),), "", "8.6"),
        (((9, 0),), "", "9.0a"),
        (((9, 0), (8, 0), (9, 0)), "", "8.0;9.0a"),
        (((7, 0),), "", "8.0+PTX;9.0a"),  # too old for the kernels: build for others
        (((13, 0),), "", "8.0+PTX"),  # newer than nvcc knows: PTX is compiled for it at run time
        (((9, 0),), "8.0 8.6+PTX", "8.0 8.6+PTX"),
    ],
)
def test_architectures(gpus, knob, expected):
    assert decide(facts(gpus=gpus), Knobs(architectures=knob)).architectures == expected


def test_hopper_without_its_own_kernels_is_noted():
    assert any("9.0a has them" in note for note in decide(CUDA_TORCH, Knobs(architectures="9.0+PTX")).notes)
    assert not any("9.0a has them" in note for note in decide(CUDA_TORCH, Knobs(architectures="9.0a")).notes)


def test_another_minor_version_builds_and_warns_once():
    decision = decide(facts(torch="2.14.0+cu132", torch_cuda="13.2"), Knobs())
    warnings = [note for note in decision.notes if note.startswith("warning")]
    assert decision.cuda and len(warnings) == 1
    assert "13.0" in warnings[0] and "13.2" in warnings[0]


def test_cpu_torch_leaves_nvcc_unused():
    decision = decide(facts(CPU_TORCH, nvccs=(NVCC_13,)), Knobs())
    assert decision.error is None and not decision.cuda
    assert "torch 2.13.0+cpu has no CUDA, so the nvcc found is not used" in decision.notes[0]
    assert decision.why == "torch 2.13.0+cpu has no CUDA, so the nvcc found is not used"


def test_cpu_torch_without_nvcc():
    decision = decide(CPU_TORCH, Knobs())
    assert decision.error is None and not decision.cuda
    assert decision.why == "torch 2.13.0+cpu has no CUDA, so no CUDA kernel can be built"


@pytest.mark.parametrize("nvccs", [(), (NVCC_13,)])
def test_cpu_torch_when_cuda_is_demanded_is_an_error(nvccs):
    decision = decide(facts(CPU_TORCH, nvccs=nvccs), Knobs(cuda="1"))
    assert "CUDA_CNN_CUDA=1, but torch 2.13.0+cpu has no CUDA" in decision.error


THREE_WAYS_OUT = (
    'pip install "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]==13.0.*"',
    "a CUDA 13 toolkit, or a -devel image",
    "CUDA_CNN_CUDA=0",
)


def test_a_gpu_without_nvcc_is_an_error_with_three_ways_out():
    decision = decide(facts(nvccs=(), gpus=((9, 0),)), Knobs())
    assert not decision.cuda and "sm_90" in decision.error
    assert all(way in decision.error for way in THREE_WAYS_OUT)


def test_no_gpu_and_no_nvcc_builds_for_the_cpu_with_a_note():
    decision = decide(facts(nvccs=()), Knobs())
    assert decision.error is None and not decision.cuda and decision.why == "no nvcc"
    assert all(way in decision.notes[0] for way in THREE_WAYS_OUT)


def test_no_nvcc_when_cuda_is_demanded_is_an_error():
    assert all(way in decide(facts(nvccs=()), Knobs(cuda="1")).error for way in THREE_WAYS_OUT)


def test_major_mismatch_names_both_versions_and_the_matching_toolkit():
    decision = decide(facts(nvccs=(NVCC_12, NVCC_13)), Knobs())
    assert "12.8" in decision.error and "13.0" in decision.error
    assert "CUDA_HOME=/opt/cuda-13.0 pip install --no-build-isolation -v ." in decision.error


def test_major_mismatch_without_another_toolkit():
    decision = decide(facts(nvccs=(NVCC_12,)), Knobs())
    assert "12.8" in decision.error and "13.0" in decision.error and "CUDA_CNN_CUDA=0" in decision.error


@pytest.mark.parametrize("nvccs", [(), (NVCC_12,), (NVCC_13,)])
def test_cuda_switched_off_wins_over_everything(nvccs):
    decision = decide(facts(nvccs=nvccs, gpus=((9, 0),)), Knobs(cuda="0"))
    assert decision.error is None and not decision.cuda and decision.why == "CUDA_CNN_CUDA=0"


def test_no_compiler_names_the_package():
    decision = decide(facts(compiler=None), Knobs(cxx="g++-99"))
    assert "g++-99" in decision.error and "apt-get install g++" in decision.error


@pytest.mark.parametrize(
    ("cores", "memory", "knob", "cuda", "expected"),
    [
        (8, 64, None, True, 8),
        (64, 32, None, True, 8),
        (64, 32, None, False, 16),
        (4, 1, None, True, 1),
        (4, 1, 3, True, 3),
    ],
)
def test_jobs_fit_cores_and_memory(cores, memory, knob, cuda, expected):
    found = facts(cores=cores, memory_gib=memory)
    assert decide(found, Knobs(cuda="auto" if cuda else "0", jobs=knob)).jobs == expected


def test_knobs():
    assert Knobs.read({}) == Knobs()
    assert Knobs.read({"FORCE_CUDA": "1"}).cuda == "1"
    assert Knobs.read({"FORCE_CUDA": "1", "CUDA_CNN_CUDA": "0"}).cuda == "0"
    assert Knobs.read({"TORCH_CUDA_ARCH_LIST": "native"}).architectures == ""
    assert Knobs.read({"MAX_JOBS": "3", "CUDA_CNN_DEBUG": "1"}) == Knobs(jobs=3, debug=True)
    with pytest.raises(SystemExit, match="expected auto, 1 or 0"):
        Knobs.read({"CUDA_CNN_CUDA": "maybe"})


def test_search_for_nvcc_takes_cuda_home_first(tmp_path):
    for version in ("12.8", "13.0"):
        nvcc = tmp_path / f"cuda-{version}" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n")
        nvcc.chmod(0o755)
        (tmp_path / f"cuda-{version}" / "include").mkdir()
        (tmp_path / f"cuda-{version}" / "include" / "cuda_runtime.h").touch()
    env = {"CUDA_HOME": str(tmp_path / "cuda-12.8"), "PATH": str(tmp_path / "cuda-13.0" / "bin")}
    homes = config._cuda_homes(env, "13.0")
    assert homes[0] == str(tmp_path / "cuda-12.8") and str(tmp_path / "cuda-13.0") in homes
    assert config._nvcc(homes[0]).version == "12.8"
    assert config._nvcc(str(tmp_path)) is None


def test_cudart_of_pips_toolkit_gets_a_link(tmp_path):
    nvcc, links = Nvcc(str(tmp_path), "13.0"), tmp_path / "links"
    (tmp_path / "lib").mkdir()
    assert config.cudart_folder(None, links) == config.cudart_folder(nvcc, links) == []
    (tmp_path / "lib" / "libcudart.so.13").write_text("the library")
    for _ in range(2):
        assert config.cudart_folder(nvcc, links) == [str(links)]
    assert (links / "libcudart.so").read_text() == "the library"
    (tmp_path / "lib" / "libcudart.so").touch()
    assert config.cudart_folder(nvcc, links) == [str(tmp_path / "lib")]


# ---- setup.py itself ------------------------------------------------------------------------------------


def run_setup(*arguments, **env):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=100
    )


@pytest.fixture
def no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return str(tmp_path)


def test_setup_without_torch_says_how_to_install(no_torch):
    result = run_setup("bdist_wheel", "--dist-dir", no_torch, PYTHONPATH=no_torch)
    assert result.returncode != 0 and config.NO_TORCH in result.stderr and "Traceback" not in result.stderr


def test_setup_with_old_setuptools_says_what_to_install(tmp_path):
    package = tmp_path / "setuptools"
    (package / "command").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '65.5.0'\nsetup = Extension = None")
    (package / "command" / "__init__.py").touch()
    (package / "command" / "build_ext.py").write_text("build_ext = None")
    result = run_setup("bdist_wheel", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "setuptools 77 or newer is needed, 65.5.0 is installed. Run: pip install -U" in result.stderr


def test_setup_without_compiler_says_what_to_install(tmp_path):
    result = run_setup("build_ext", CXX="no-such-compiler", CUDA_CNN_CUDA="0")
    assert result.returncode != 0 and "looked for no-such-compiler" in result.stderr


def test_sdist_needs_no_torch_and_holds_every_source(tmp_path, no_torch):
    result = run_setup(
        "egg_info", "-e", str(tmp_path), "sdist", "--dist-dir", str(tmp_path), PYTHONPATH=no_torch
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted |= {"setup.py", "build_config.py", "pyproject.toml", "LICENSE", "cuda_cnn/py.typed"}
    assert wanted <= held, sorted(wanted - held)
    assert not any(name.endswith((".so", ".json")) and name.startswith("cuda_cnn/_") for name in held)


def test_no_pinned_standard_and_no_native_code():
    text = (ROOT / "setup.py").read_text().split('"""', 2)[2]
    assert not re.search(r"-std=|march=|ffast-math", text)


# ---- Messages at run time -------------------------------------------------------------------------------


def test_another_torch_than_at_build():
    message = torch_mismatch("2.12.1", "2.13.0")
    assert "built with torch 2.12.1, running 2.13.0: rebuild with pip install --no-build-isolation" in message
    assert torch_mismatch("2.13.0+cpu", "2.13.0+cpu") is None


def test_gpu_not_in_the_binary():
    assert missing_architecture((12, 0), "8.0;9.0a") == (
        "this GPU is sm_120; the build holds sm_80, sm_90a and no PTX. Rebuild with TORCH_CUDA_ARCH_LIST=12.0"
    )


@pytest.mark.parametrize(
    ("capability", "held", "runs"),
    [
        ((8, 0), "8.0", True),
        ((8, 9), "8.0", True),
        ((8, 0), "8.6", False),
        ((9, 0), "9.0a", True),
        ((10, 0), "9.0a", False),
        ((12, 0), "8.0+PTX;9.0a", True),
        ((7, 5), "8.0+PTX", False),
        ((12, 1), "12.0", True),
        ((9, 0), "", False),
    ],
)
def test_which_gpus_a_binary_runs_on(capability, held, runs):
    assert (missing_architecture(capability, held) is None) is runs


def test_build_note():
    without = {"cuda": False, "why": "no nvcc", "date": "2026-11-23", "architectures": ""}
    assert build_note(without) == "no nvcc when built on 2026-11-23"
    assert build_note({"cuda": True, "architectures": "8.0+PTX;9.0a"}) == "sm_80, sm_90a and PTX of 8.0"
