"""The operators, with the signatures of `torch.nn.functional`."""

from cuda_cnn.ops.batch_norm import batch_norm
from cuda_cnn.ops.local_response_norm import local_response_norm

__all__ = ["batch_norm", "local_response_norm"]
