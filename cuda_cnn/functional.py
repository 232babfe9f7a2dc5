"""The operators, with the signatures of `torch.nn.functional`."""

from cuda_cnn.ops.local_response_norm import local_response_norm

__all__ = ["local_response_norm"]
