"""Hand-written kernels for the classic convolutional networks, as PyTorch operators."""

from cuda_cnn import _extension  # noqa: F401  (first: it checks the build, loads it, registers the operators)

# isort: split
from cuda_cnn import backends, functional, nn, reference
from cuda_cnn._build_info import build_info as _build_info
from cuda_cnn._C import empty_cache
from cuda_cnn.convert import convert, revert
from cuda_cnn.explain import explain
from cuda_cnn.fuse import fuse, unfuse
from cuda_cnn.models import create_model, list_models, load_weights
from cuda_cnn.override import disable, enable, reset, use

__version__: str = _build_info()["version"]

__all__ = [
    "backends",
    "convert",
    "create_model",
    "disable",
    "empty_cache",
    "enable",
    "explain",
    "functional",
    "fuse",
    "list_models",
    "load_weights",
    "nn",
    "reference",
    "reset",
    "revert",
    "unfuse",
    "use",
]
