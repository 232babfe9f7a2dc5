"""Weights from a file: torchvision's published ones, safetensors, or a checkpoint of `cuda-cnn train`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read_weights"]

# torchvision's published DenseNet files are older than its own names: denselayer1.norm.1 is denselayer1.norm1.
_OLD_DENSE_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads the weights in a file into `model`, in place, and returns it.

    path: a .pth or .pt file of a state_dict (torchvision's published files), .safetensors, or a checkpoint of
    `cuda-cnn train` or its folder. Auxiliary classifiers in the file that the network lacks are left out.

    Raises ValueError, naming the file, where it cannot be read, or tensors are missing, too many or of another
    shape (as with another num_classes); the network is then as it was.
    """
    weights, own = read_weights(path), model.state_dict()
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith(("aux1.", "aux2."))}
    absent = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in own]
    for what, names in (("lacks", absent), ("has, and the network lacks,", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: another network's weights: it {what} {', '.join(names[:3])}{more}")
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} is {list(tensor.shape)} there and {list(own[name].shape)} in the network "
                "(other num_classes or in_chans?)"
            )
    model.load_state_dict(weights, strict=False)
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file, by today's names. Runs no code from it; ValueError where it cannot be read."""
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # torch, pickle and safetensors raise a dozen types on damaged files
        raise ValueError(f"{file}: not readable as weights ({type(error).__name__}: {error})") from error
    content = content.get("weights", content) if isinstance(content, dict) else {}
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: holds no state_dict")
    return {_OLD_DENSE_NAME.sub(r"\1\2.", name.removeprefix("module.")): v for name, v in content.items()}
