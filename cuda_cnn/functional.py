"""The operators, with the signatures of `torch.nn.functional`."""

from cuda_cnn.ops.batch_norm import batch_norm
from cuda_cnn.ops.concat import concat, write_channels_
from cuda_cnn.ops.conv2d import conv2d
from cuda_cnn.ops.conv2d_fused import channel_map, channel_statistics, conv2d_fused
from cuda_cnn.ops.local_response_norm import local_response_norm
from cuda_cnn.ops.max_pool2d import max_pool2d
from cuda_cnn.ops.subsample import subsample

cat = concat

__all__ = [
    "batch_norm",
    "cat",
    "channel_map",
    "channel_statistics",
    "concat",
    "conv2d",
    "conv2d_fused",
    "local_response_norm",
    "max_pool2d",
    "subsample",
    "write_channels_",
]
