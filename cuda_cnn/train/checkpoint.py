"""Checkpoints: written whole or not at all, readable without running any code from the file.

A run's folder holds `checkpoint.pt` (weights, optimiser, random states, history: what `--resume` needs, plain
types and tensors only) and `weights.safetensors` (weights and a JSON description, for everybody else).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from ..models import create_model

__all__ = ["CheckpointError", "load_checkpoint", "restore_model", "save_checkpoint", "write_atomic"]

STATE_FILE, WEIGHTS_FILE = "checkpoint.pt", "weights.safetensors"
DESCRIPTION = ("format", "model", "model_args", "classes", "shape", "data")
OPTIONAL = ("levels", "recipe")
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or used for what was asked."""


def write_atomic(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a temporary file, syncs it to disk and renames it to `path`: an earlier file there
    survives a full disk or a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        survivor = "; the earlier one is untouched" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written ({error}){survivor}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_checkpoint(folder: str | Path, state: dict) -> None:
    """Writes `checkpoint.pt` and `weights.safetensors` into `folder`; CheckpointError where it cannot."""
    state = {"format": FORMAT, **state}
    write_atomic(Path(folder) / STATE_FILE, lambda file: torch.save(state, file))
    try:
        from safetensors.torch import save
    except ImportError:
        return
    weights = {name: t.detach().cpu().contiguous() for name, t in state["weights"].items()}
    description = {key: json.dumps(state[key]) for key in (*DESCRIPTION, *OPTIONAL) if key in state}
    write_atomic(Path(folder) / WEIGHTS_FILE, lambda file: file.write(save(weights, description)))


def load_checkpoint(path: str | Path) -> dict:
    """Reads a run's folder, a `.pt` or a `.safetensors` file (which has no state to resume from).

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_state(path)
    missing = [key for key in (*DESCRIPTION, "weights") if key not in state]
    if missing:
        raise CheckpointError(f"{path}: not a cuda_cnn checkpoint (lacks {', '.join(missing)})")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}")
    return state


def restore_model(state: dict) -> nn.Module:
    """The network of a checkpoint, with its weights. Raises CheckpointError where they do not fit."""
    model = create_model(state["model"], **state["model_args"])
    try:
        model.load_state_dict(state["weights"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint's weights do not fit {state['model']}: {reason}") from error
    return model


def _read_state(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: corrupt checkpoint (checksum of {damaged} does not match)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise a dozen different types on damaged files
        raise CheckpointError(
            f"{path}: truncated or corrupt checkpoint ({type(error).__name__}: {error})"
        ) from error
    return state if isinstance(state, dict) else {}


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            known = (*DESCRIPTION, *OPTIONAL)
            metadata = file.metadata() or {}
            description = {key: json.loads(text) for key, text in metadata.items() if key in known}
            return {**description, "weights": {name: file.get_tensor(name) for name in list(file.keys())}}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt checkpoint ({error})") from error


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
