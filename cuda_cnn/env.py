"""`python -m cuda_cnn env`: versions, what was built and why, and a self-test of each operator."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_cnn import _C, functional, reference
from cuda_cnn._build_info import build_info, missing_architecture

FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
)
# Largest error over largest value, of float32 against the reference in float64. Rounding stays below 2e-6 on the
# self-test's shapes; a wrong tap or a missed edge is orders of magnitude above.
TOLERANCE = 1e-5

# operator: shapes of its tensors, and the call with either library (cuda_cnn.functional or cuda_cnn.reference).
SelfTest = tuple[list[tuple[int, ...]], Callable[..., Tensor]]
SELF_TESTS: dict[str, SelfTest] = {
    "conv2d": (
        [(2, 8, 13, 11), (12, 4, 3, 3), (12,)],
        lambda lib, x, w, b: lib.conv2d(x, w, b, stride=(2, 2), padding=(1, 1), groups=2),
    ),
    "max_pool2d": ([(2, 5, 13, 11)], lambda lib, x: lib.max_pool2d(x, 3, 2, 1)),
    "local_response_norm": ([(2, 19, 7, 5)], lambda lib, x: lib.local_response_norm(x, 5, 1e-1, 0.75, 2.0)),
    "batch_norm": (
        [(4, 19, 7, 5), (19,), (19,)],
        lambda lib, x, w, b: lib.batch_norm(x, None, None, w, b, True),
    ),
    "concat": ([(2, 3, 7, 5), (2, 19, 7, 5)], lambda lib, *tensors: lib.concat(list(tensors), 1)),
    "subsample": ([(2, 6, 14, 10), (6,), (6,)], lambda lib, x, w, b: lib.subsample(x, w, b)),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("env", help="versions, what was built and why, self-test of each operator")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 when a self-test fails or a GPU cannot run the build."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["ok"] else 1


def collect() -> dict[str, Any]:
    """Everything that `python -m cuda_cnn env --json` prints."""
    operators = {name: self_test(name) for name in SELF_TESTS}
    gpus = list(_gpus())
    failed = any(result.startswith("failed") for results in operators.values() for result in results.values())
    return {
        "ok": not failed and not any(gpu["problem"] for gpu in gpus),
        "versions": {
            "cuda_cnn": build_info()["version"],
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": build_info(),
        "cpu": {
            "model": cpu_model(),
            "features": _cpu_features(),
            "instruction_sets": _C.cpu_isas(),
            "instruction_set": _C.cpu_isa(),
            "CUDA_CNN_CPU_ISA": os.environ.get("CUDA_CNN_CPU_ISA"),
            "threads": _C.num_threads(),
        },
        "gpus": gpus,
        "operators": operators,
    }


# ---- Self-test ------------------------------------------------------------------------------------------


def self_test(name: str) -> dict[str, str]:
    """For each instruction set and for CUDA: "ok" or "failed: …", forward and backward, in both layouts."""
    results = {}
    for isa in _C.cpu_isas():
        with instruction_set(isa):
            results[isa] = _compare(name, "cpu")
    if _C.with_cuda and torch.cuda.is_available():
        results["cuda"] = _compare(name, "cuda")
    return results


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def _compare(name: str, device: str) -> str:
    shapes, call = SELF_TESTS[name]
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator).double() for shape in shapes]
    try:
        expected = _with_gradients(call, reference, exact)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ours = [_lay_out(t.to(device, torch.float32), memory_format) for t in exact]
            for what, actual, wanted in zip(
                ("output", *(f"gradient {i}" for i in range(len(shapes)))),
                _with_gradients(call, functional, ours),
                expected,
                strict=True,
            ):
                error = float((actual.double().cpu() - wanted).abs().max() / wanted.abs().max())
                if not error <= TOLERANCE:  # NaN fails too
                    layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
                    return f"failed: {what}, {layout}: relative error {error:.1e}"
    except Exception as error:  # whatever an operator raises is the report's to tell
        return f"failed: {type(error).__name__}: {error}"
    return "ok"


def _lay_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _with_gradients(call: Callable[..., Tensor], library: Any, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = call(library, *leaves)
    # Weights that differ everywhere: the sum's gradient, a constant, would hide a permutation.
    dy = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# ---- The machine ----------------------------------------------------------------------------------------


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() in keys), "")


def cpu_model() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    held = _cpuinfo("flags", "Features").split()
    return [name for name in FEATURES if name in held]


def _gpus() -> Iterator[dict[str, Any]]:
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        problem = missing_architecture(capability, build_info()["architectures"]) if _C.with_cuda else None
        name = torch.cuda.get_device_name(index)
        yield {"name": name, "capability": "{}.{}".format(*capability), "problem": problem}


# ---- Text -----------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    versions, build, cpu = report["versions"], report["build"], report["cpu"]
    forced = f" (CUDA_CNN_CPU_ISA={cpu['CUDA_CNN_CPU_ISA']})" if cpu["CUDA_CNN_CPU_ISA"] else ""
    cuda = f"yes, architectures {build['architectures']}" if build["cuda"] else "no"
    rows = [
        ("cuda_cnn", f"{versions['cuda_cnn']}, commit {build['commit']}, built {build['date']}"),
        (
            "torch",
            f"{versions['torch']}, CUDA {versions['torch_cuda'] or 'none'}, cuDNN {versions['cudnn'] or 'none'}",
        ),
        ("Python", f"{versions['python']}, {versions['platform']}"),
        ("compiler", build["compiler"]),
        ("CUDA kernels", f"{cuda}: {build['why']}"),
        ("processor", cpu["model"]),
        ("features", " ".join(cpu["features"]) or "unknown"),
        ("instructions", f"{cpu['instruction_set']}{forced}, of {', '.join(cpu['instruction_sets'])}"),
        ("threads", str(cpu["threads"])),
    ]
    for gpu in report["gpus"]:
        rows.append(("GPU", f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}"))
        rows += [("", gpu["problem"])] if gpu["problem"] else []
    lines = [f"{name:<14}{text}" for name, text in rows]
    lines += [
        "",
        "Self-test, forward and backward, float32 in both layouts against cuda_cnn.reference in float64:",
    ]
    for name, results in report["operators"].items():
        if set(results.values()) == {"ok"}:
            lines.append(f"  {name:<22}ok: {', '.join(results)}")
        else:
            lines += [f"  {name:<22}{where}: {result}" for where, result in results.items()]
    lines += ["", "All is well." if report["ok"] else "FAILED: see above."]
    return "\n".join(lines)
