"""Hand-written kernels for the classic convolutional networks, as PyTorch operators."""

import torch as _torch  # noqa: F401  (the extension links against torch: it must be loaded first)

from cuda_cnn import _C  # noqa: F401
from cuda_cnn import functional, nn
from cuda_cnn.models import create_model, list_models

__all__ = ["create_model", "functional", "list_models", "nn"]
