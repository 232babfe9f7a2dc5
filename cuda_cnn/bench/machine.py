"""The header of a run: what it was measured on, and with what."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import _C
from .._build_info import build_info
from ..env import cpu_model
from .devices import Device
from .rivals import vendor

__all__ = ["busy", "header", "machine_name", "words"]

ROOT = Path(__file__).parents[2]
_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def header(device: Device) -> dict[str, Any]:
    """Machine, versions, threads, clocks, switches. No name of a host or of a person."""
    return {
        "machine": device.name,
        "device": device.kind,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_isa(),
        "clock_mhz": _cpu_clock(),
        "gpu": _gpu() if device.kind == "cuda" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "onednn": vendor("conv2d"),
        "tf32": torch.backends.cudnn.allow_tf32 if device.kind == "cuda" else None,
        "cuda_cnn": build_info()["version"],
        "commit": commit(),
        "kernels": kernels(),
        "compiler": build_info()["compiler"],
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """That of the source tree where there is one (with `+` where files are changed), else the build's."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return build_info()["commit"]
    named = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    changed = _output(
        "git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "cuda_cnn", "csrc"
    )
    return named + ("+" if changed.strip() else "") if named else build_info()["commit"]


def kernels() -> str | None:
    """git's name of csrc/ as it is committed: the same kernels have the same one in every history."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    return _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD:csrc").strip() or None


def machine_name(head: dict[str, Any]) -> str:
    """A folder for its results: the device's model, its instruction set and threads, never a host's name."""
    extra = f" {head['instruction_set']} {head['threads']} threads" if head["device"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{head['machine']}{extra}".lower()).strip("-")


def words(head: dict[str, Any]) -> list[str]:
    """The header as lines of text."""
    cpu = f"{head['cores']} cores, {head['threads']} threads, {head['instruction_set']}, {head['clock_mhz']} MHz"
    vendor_version = f"cuDNN {head['cudnn']}" if head["device"] == "cuda" else head["onednn"]
    lines = [
        f"{head['machine']}: {cpu if head['device'] == 'cpu' else head['gpu']}",
        f"torch {head['torch']}, {vendor_version}, CUDA {head['cuda'] or 'none'}, Python {head['python']}",
        f"cuda_cnn {head['cuda_cnn']}, commit {head['commit']} (csrc {head['kernels']}), {head['date']}",
    ]
    if head["tf32"] is not None:
        lines.append(f"TF32 {'on' if head['tf32'] else 'off'}, for all rivals alike")
    return lines


def busy() -> str:
    """A note where other programs keep the processor busy; empty where not."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores + 1:
        return ""
    return f"The machine was busy (load {load:.1f} on {cores} cores): do not trust these times, run it again."


def _cpu_clock() -> int | None:
    try:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return round(max(map(float, found))) if found else None


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown clocks (no nvidia-smi)"
    return _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader").strip()


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout if done.returncode == 0 else ""
