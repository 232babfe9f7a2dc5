"""Malformed calls of every operator and module: a Python exception that names what was wrong, never a crash.

What is torch's has torch's type of exception (or one derived from it). Pictures, data sets and checkpoints:
test_data.py, test_train.py.
"""

import pytest
import torch

from cuda_cnn import functional as F
from cuda_cnn import nn

X = torch.ones(2, 4, 8, 8)
W = torch.ones(6, 4, 3, 3)
V = torch.ones(4)
HUGE = torch.ones(1, 1, 1, 1).expand(2**20, 4, 2**20, 2**20)  # one element in memory

CONV2D = {
    "matrix": (lambda f: f.conv2d(X[0, 0], W), RuntimeError, r"3 \(unbatched\) or 4 \(batched\) .* got 2"),
    "five dimensions": (lambda f: f.conv2d(X[None], W), RuntimeError, r"got 5 \(shape \[1, 2, 4, 8, 8\]\)"),
    "weight's rank": (lambda f: f.conv2d(X, W[0]), RuntimeError, "weight of 4 dimensions, got 3"),
    "channels": (lambda f: f.conv2d(X, W[:, :3]), RuntimeError, "input of 3 channels .* got 4"),
    "bias's size": (lambda f: f.conv2d(X, W, V), RuntimeError, r"bias of shape \[6\], got \[4\]"),
    "bias's rank": (lambda f: f.conv2d(X, W, torch.ones(6, 1)), RuntimeError, r"got \[6, 1\]"),
    "stride 0": (lambda f: f.conv2d(X, W, stride=0), RuntimeError, "stride > 0, got"),
    "stride -1": (lambda f: f.conv2d(X, W, stride=-1), RuntimeError, "stride > 0, got"),
    "three strides": (lambda f: f.conv2d(X, W, stride=(1, 2, 3)), RuntimeError, "stride of one or two"),
    "stride 1.5": (lambda f: f.conv2d(X, W, stride=1.5), TypeError, "stride of whole numbers"),
    "padding -1": (lambda f: f.conv2d(X, W, padding=-1), RuntimeError, "padding >= 0"),
    "padding's name": (lambda f: f.conv2d(X, W, padding="full"), RuntimeError, "got 'full'"),
    "strided same": (lambda f: f.conv2d(X, W, None, 2, "same"), RuntimeError, 'stride 1 with padding "same"'),
    "padding of 2^62": (lambda f: f.conv2d(X, W, padding=2**62), RuntimeError, r"padding .* below 2\^31"),
    "dilation 0": (lambda f: f.conv2d(X, W, dilation=0), RuntimeError, "dilation > 0"),
    "dilated kernel": (lambda f: f.conv2d(X, W, dilation=4), RuntimeError, "no larger than the padded input"),
    "large kernel": (lambda f: f.conv2d(X[..., :2], W), RuntimeError, "got 3 against 2"),
    "empty kernel": (lambda f: f.conv2d(X, W[:, :, :0]), RuntimeError, "kernel of at least 1 x 1"),
    "groups 0": (lambda f: f.conv2d(X, W, groups=0), RuntimeError, "groups > 0, got 0"),
    "groups": (lambda f: f.conv2d(X, W, groups=2), RuntimeError, "input of 8 channels .* 2 groups"),
    "uneven groups": (lambda f: f.conv2d(X, W[:5, :2], groups=2), RuntimeError, "2 groups of equal size"),
    "weight's dtype": (
        lambda f: f.conv2d(X, W.double()),
        RuntimeError,
        "weight of dtype Float .* got Double",
    ),
    "complex": (lambda f: f.conv2d(X.cfloat(), W.cfloat()), None, "input of dtype .* got ComplexFloat"),
    "sparse": (lambda f: f.conv2d(X.to_sparse(), W), RuntimeError, "input to be a dense .* got Sparse"),
    "sparse weight": (
        lambda f: f.conv2d(X, W.to_sparse()),
        RuntimeError,
        "weight to be a dense .* got Sparse",
    ),
    "list": (lambda f: f.conv2d([1.0], W), TypeError, "input to be a Tensor, got list"),
    "too large": (lambda f: f.conv2d(HUGE, W), None, "overflow|allocate"),
}
MAX_POOL2D = {
    "matrix": (lambda f: f.max_pool2d(X[0, 0], 2), RuntimeError, "3 or 4 dimensions, got 2"),
    "kernel 0": (lambda f: f.max_pool2d(X, 0), RuntimeError, "kernel size should be greater than zero"),
    "kernel of 2^62": (lambda f: f.max_pool2d(X, 2**62), RuntimeError, "kernel size .* got 46116860"),
    "kernel 2.5": (lambda f: f.max_pool2d(X, 2.5), TypeError, "kernel_size to be an int .* got 2.5"),
    "three numbers": (lambda f: f.max_pool2d(X, (2, 2, 2)), RuntimeError, r"kernel_size .* got \(2, 2, 2\)"),
    "stride 0": (lambda f: f.max_pool2d(X, 2, 0), RuntimeError, "stride should be greater than zero"),
    "stride -1": (lambda f: f.max_pool2d(X, 2, -1), RuntimeError, "stride should be greater than zero"),
    "padding 2": (lambda f: f.max_pool2d(X, 2, padding=2), RuntimeError, "pad should be at most half"),
    "padding -1": (lambda f: f.max_pool2d(X, 2, padding=-1), RuntimeError, "pad must be non-negative"),
    "dilation 0": (lambda f: f.max_pool2d(X, 2, dilation=0), RuntimeError, "dilation should be greater"),
    "large kernel": (lambda f: f.max_pool2d(X, 9), RuntimeError, "Output size is too small"),
    "empty plane": (lambda f: f.max_pool2d(X[:, :, :0], 2), RuntimeError, r"got shape \[2, 4, 0, 8\]"),
    "sparse": (lambda f: f.max_pool2d(X.to_sparse(), 2), NotImplementedError, "input to be a dense"),
    "bool": (lambda f: f.max_pool2d(X.bool(), 2), NotImplementedError, "input of dtype .* got Bool"),
    "list": (lambda f: f.max_pool2d([1.0], 2), TypeError, "input to be a Tensor, got list"),
}
LOCAL_RESPONSE_NORM = {
    "matrix": (lambda f: f.local_response_norm(X[0, 0], 5), ValueError, "3 or more dimensions, got 2"),
    "size 0": (lambda f: f.local_response_norm(X, 0), RuntimeError, "size > 0, got 0"),
    "size -3": (lambda f: f.local_response_norm(X, -3), RuntimeError, "size > 0, got -3"),
    "size 2.5": (lambda f: f.local_response_norm(X, 2.5), TypeError, "size to be an int, got 2.5"),
    "whole numbers": (lambda f: f.local_response_norm(X.int(), 5), NotImplementedError, "got Int"),
    "sparse": (lambda f: f.local_response_norm(X.to_sparse(), 5), NotImplementedError, "to be a dense"),
    "list": (lambda f: f.local_response_norm([1.0], 5), None, "input to be a Tensor, got list"),
    "too large": (lambda f: f.local_response_norm(HUGE, 5), RuntimeError, "overflow|allocate"),
}
BATCH_NORM = {
    "vector": (
        lambda f: f.batch_norm(V, None, None, training=True),
        IndexError,
        "2 or more dimensions, got 1",
    ),
    "one value": (
        lambda f: f.batch_norm(X[:1, :, :1, :1], V, V, training=True),
        ValueError,
        "more than 1 value",
    ),
    "no statistics": (lambda f: f.batch_norm(X, None, None), RuntimeError, "running_mean must be defined"),
    "no variance": (lambda f: f.batch_norm(X, V, None, training=True), ValueError, "both be None or neither"),
    "mean's size": (lambda f: f.batch_norm(X, V[:3], V), RuntimeError, "running_mean of 4 elements.* got 3"),
    "weight's size": (lambda f: f.batch_norm(X, V, V, V[:1]), RuntimeError, "weight of 4 elements.* got 1"),
    "mean's dtype": (lambda f: f.batch_norm(X, V.double(), V), RuntimeError, "running_mean of dtype Float"),
    "weight's device": (
        lambda f: f.batch_norm(X, V, V, V.to("meta")),
        RuntimeError,
        "weight on cpu .* got meta",
    ),
    "eps": (lambda f: f.batch_norm(X, V, V, eps=-1.0), ValueError, "eps must be non-negative, got -1"),
    "momentum": (lambda f: f.batch_norm(X, V, V, momentum="a"), TypeError, "momentum to be a float, got 'a'"),
    "sparse": (lambda f: f.batch_norm(X.to_sparse(), V, V), NotImplementedError, "input to be a dense"),
    "whole numbers": (lambda f: f.batch_norm(X.int(), V, V), NotImplementedError, "got Int"),
    "string": (lambda f: f.batch_norm(X, "a", V), TypeError, "running_mean to be a Tensor, got str"),
    "too large": (lambda f: f.batch_norm(HUGE, V, V), RuntimeError, "overflow|allocate"),
}
TWINS = {
    f"{operator}, {name}": case
    for operator, cases in (
        ("conv2d", CONV2D),
        ("max_pool2d", MAX_POOL2D),
        ("local_response_norm", LOCAL_RESPONSE_NORM),
        ("batch_norm", BATCH_NORM),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", TWINS)
def test_twin_of_torch(case):
    call, error, text = TWINS[case]
    with pytest.raises(error or (RuntimeError, TypeError), match=text):
        call(F)
    if error is not None:  # None: torch has the operation, or crashes on it
        with pytest.raises(error):
            call(torch.nn.functional)


OURS = {
    "concat, ranks": (lambda: F.concat([X, X[0]], 1), RuntimeError, "same number of dimensions: got 4 and 3"),
    "concat, sizes": (lambda: F.concat([X, X[..., :3]], 1), RuntimeError, "Expected size 8 but got size 3"),
    "concat, nothing": (lambda: F.concat([]), ValueError, "non-empty list of Tensors"),
    "concat, a tensor": (lambda: F.concat(X), TypeError, "must be tuple of Tensors, not Tensor"),
    "concat, None": (lambda: F.concat([X, None]), TypeError, "element 1 of tensors, but got NoneType"),
    "concat, dimension": (lambda: F.concat([X, X], 4), IndexError, r"range of \[-4, 3\], but got 4"),
    "concat, sparse": (lambda: F.concat([X.to_sparse(), X]), RuntimeError, "dense .* got Sparse"),
    "concat, devices": (lambda: F.concat([X, X.to("meta")]), RuntimeError, "device"),
    "write, channels": (
        lambda: F.write_channels_(X.clone(), X, 2),
        RuntimeError,
        "channels 2 to 6 .* buffer of 4",
    ),
    "subsample, rank": (lambda: F.subsample(X[0, 0], V, V), RuntimeError, "3 or 4 dimensions, got 2"),
    "subsample, size": (
        lambda: F.subsample(X, V[:2], V),
        RuntimeError,
        r"coefficient of shape \[4\], got \[2\]",
    ),
    "subsample, squash": (lambda: F.subsample(X, V, V, squash="relu"), ValueError, 'got "relu"'),
    "subsample, window": (lambda: F.subsample(X, V, V, 0), RuntimeError, "kernel_size > 0, got 0"),
    "subsample, plane": (lambda: F.subsample(X[..., :1], V, V), RuntimeError, "Output size is too small"),
    "subsample, None": (
        lambda: F.subsample(X, None, V),
        TypeError,
        "coefficient to be a Tensor, got NoneType",
    ),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=3), ValueError, "divisible by groups"),
    "Conv2d, dtype": (lambda: nn.Conv2d(4, 6, 3)(X.double()), RuntimeError, "dtype Double .* got Float"),
    "Conv2d, channels": (lambda: nn.Conv2d(3, 6, 3)(X), RuntimeError, "input of 3 channels .* got 4"),
    "BatchNorm2d, rank": (lambda: nn.BatchNorm2d(4)(X[0]), ValueError, "expected 4D input"),
    "BatchNorm2d, channels": (lambda: nn.BatchNorm2d(5)(X), RuntimeError, "of 4 elements.* got 5"),
    "BatchNorm2d, residual": (lambda: nn.BatchNorm2d(4)(X, X[:1]), RuntimeError, "residual of shape"),
    "MaxPool2d, kernel": (lambda: nn.MaxPool2d(9)(X), RuntimeError, "an input of 8x8 gives 0x0"),
    "LocalResponseNorm, rank": (lambda: nn.LocalResponseNorm(5)(X[0, 0]), ValueError, "got 2"),
    "Subsample2d, channels": (lambda: nn.Subsample2d(5)(X), RuntimeError, r"shape \[4\], got \[5\]"),
}


@pytest.mark.parametrize("case", OURS)
def test_our_own(case):
    call, error, text = OURS[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU, torch itself refuses the device")
def test_absent_device_is_an_error():
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        F.conv2d(X.to("cuda"), W)
