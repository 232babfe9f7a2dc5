"""The classic networks, each as its paper defines it.

Their modules are imported on the first call, so that importing this package needs no kernels.
"""

from .registry import create_model, list_models, register_model
from .weights import load_weights

__all__ = ["create_model", "list_models", "load_weights", "register_model"]
