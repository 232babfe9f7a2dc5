"""The operators, with the signatures of `torch.nn.functional`."""

from cuda_cnn.ops.batch_norm import batch_norm
from cuda_cnn.ops.concat import concat, write_channels_
from cuda_cnn.ops.conv2d import conv2d
from cuda_cnn.ops.local_response_norm import local_response_norm
from cuda_cnn.ops.max_pool2d import max_pool2d
from cuda_cnn.ops.subsample import subsample

cat = concat

__all__ = [
    "batch_norm",
    "cat",
    "concat",
    "conv2d",
    "local_response_norm",
    "max_pool2d",
    "subsample",
    "write_channels_",
]
