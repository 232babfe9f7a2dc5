"""Tensors on a GPU that cannot be served: each case has a text of its own, for every operator.

No GPU is needed: the tensors say that they are on one (emulation.on_gpu), and operators refuse before they read.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import Unavailable, emulated, on_gpu
from torch import Tensor

from cuda_cnn import _C, nn
from cuda_cnn import functional as F
from cuda_cnn._build_info import build_info, build_note

WINDOW = ([2, 2], [2, 2], [0, 0], [1, 1])
GEOMETRY = ([1, 1], [0, 0], [1, 1], 1)
ops = torch.ops.cuda_cnn


# Each operator of an image x; `at` makes its further tensors, of a shape and a dtype (float32 if none).
At = Callable[..., Tensor]
SHAPE, PLANE, CHANNELS = (4, 4, 4, 4), (4, 4, 2, 2), (4,)
OPERATORS: dict[str, Callable[[Tensor, At], object]] = {
    "conv2d": lambda x, at: F.conv2d(x, at(SHAPE)),
    "conv2d_input_grad": lambda x, at: ops.conv2d_input_grad(x, at(SHAPE), [4, 4, 7, 7], *GEOMETRY, False),
    "conv2d_weight_grad": lambda x, at: ops.conv2d_weight_grad(x, at(SHAPE), [4, 4, 1, 1], *GEOMETRY, False),
    "conv2d_bias_grad": lambda x, _: ops.conv2d_bias_grad(x),
    "conv2d_fused": lambda x, at: F.conv2d_fused(x, at(SHAPE), None, at(CHANNELS), at(CHANNELS), True),
    "channel_map": lambda x, at: F.channel_map(x, at(CHANNELS), at(CHANNELS), at(SHAPE), True),
    "channel_statistics": lambda x, _: F.channel_statistics(x),
    "max_pool2d": lambda x, _: F.max_pool2d(x, 2),
    "max_pool2d_with_indices": lambda x, _: F.max_pool2d(x, 2, return_indices=True),
    "max_pool2d_backward": lambda x, at: ops.max_pool2d_backward(x, at(SHAPE, torch.uint8), [8, 8], *WINDOW),
    "max_pool2d_gather": lambda x, at: ops.max_pool2d_gather(x, at(PLANE, torch.uint8), *WINDOW),
    "local_response_norm": lambda x, _: F.local_response_norm(x, 5),
    "local_response_norm_backward": lambda x, at: ops.local_response_norm_backward(at(SHAPE), x, 5, 1, 1, 1),
    "batch_norm": lambda x, at: F.batch_norm(x, None, None, at(CHANNELS), at(CHANNELS), True),
    "batch_norm evaluating": lambda x, at: F.batch_norm(x, at(CHANNELS), at(CHANNELS)),
    "concat": lambda x, at: F.concat([x, at(SHAPE)], 1),
    "write_channels_": lambda x, at: F.write_channels_(x, at(SHAPE), 0),
    "subsample": lambda x, at: F.subsample(x, at(CHANNELS, x.dtype), at(CHANNELS, x.dtype)),
}
ALONE = {name for name, call in OPERATORS.items() if call.__code__.co_varnames[1] == "_"}
ANY_DTYPE = {"concat", "write_channels_"}  # they copy bytes
every_operator = pytest.mark.parametrize("name", OPERATORS)


class Places:
    """Where tensors of ones can lie: "cpu", "cuda:0", "cuda:1"; the GPUs faked or not."""

    def __init__(self, gpu: Callable[[Tensor, int], Tensor], gpus: int) -> None:
        self.gpu, self.gpus = gpu, gpus

    def at(self, place: str) -> At:
        def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            x = torch.ones(shape, dtype=dtype)
            return x if place == "cpu" else self.gpu(x, int(place.removeprefix("cuda:")))

        return make


def faked(x: Tensor, gpu: int = 0) -> Tensor:
    try:
        return on_gpu(x, gpu)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["cuda_emulated", "cuda"])
def places(request: pytest.FixtureRequest) -> Iterator[Places]:
    if request.param == "cuda_emulated":
        faked(torch.ones(1))
        with emulated():
            yield Places(faked, 2)
    elif _C.with_cuda and torch.cuda.is_available():
        yield Places(lambda x, gpu: x.to(f"cuda:{gpu}"), torch.cuda.device_count())
        torch.cuda.synchronize()
    else:
        pytest.skip("needs a GPU and a build with CUDA")


# ---- A build without CUDA ------------------------------------------------------------------------------------


@pytest.mark.skipif(_C.with_cuda, reason="a build with CUDA")
@every_operator
def test_a_build_without_cuda_says_so(name):
    operator = name.split()[0]
    text = rf"cuda_cnn::{operator}\w* was built without CUDA \(.+ when built on .+\)\. See: python -m cuda_cnn env"
    places = Places(faked, 1)
    for other in ("cuda:0", "cpu"):
        with pytest.raises(RuntimeError, match=text) as error:
            OPERATORS[name](places.at("cuda:0")(SHAPE), places.at(other))
        assert build_note(build_info()) in str(error.value)


@pytest.mark.skipif(_C.with_cuda, reason="a build with CUDA")
def test_a_module_of_a_build_without_cuda_says_so():
    x, weight = (faked(torch.ones(*shape)) for shape in ((1, 3, 8, 8), (4, 3, 3, 3)))
    layer = nn.Conv2d(3, 4, 3, bias=False)
    layer.weight = torch.nn.Parameter(weight)
    # A torch without CUDA cannot record a derivative there.
    for call in (lambda: layer(x), lambda: nn.MaxPool2d(2)(x), lambda: nn.BatchNorm2d(3)(x)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="was built without CUDA"):
            call()


# ---- A build with CUDA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")], ids="-".join)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ALONE])
def test_tensors_on_two_devices(places, name, where):
    if places.gpus < 2 and "cuda:1" in where:
        pytest.skip("needs two GPUs")
    x, at = places.at(where[0])(SHAPE), places.at(where[1])
    with pytest.raises(RuntimeError, match=rf"{name[:6]}.*: expected .* on {where[0]}.* got .*{where[1]}"):
        OPERATORS[name](x, at)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ANY_DTYPE])
def test_unsupported_dtype(places, name):
    at = places.at("cuda:0")
    text = r"expected (input|grad_output) of dtype float32, float64, bfloat16 or float16, got Int"
    with pytest.raises(NotImplementedError, match=text):
        OPERATORS[name](at(SHAPE, torch.int32), at)
