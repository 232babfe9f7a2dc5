"""conv2d as PyTorch sees it: strides, transforms, compilation, modules, switches, errors."""

import itertools

import pytest
import torch
from helpers import LAYOUTS, assert_bitwise, lay_out, reals
from test_conv2d import TORCH, small_integers
from torch.utils.flop_counter import FlopCounterMode

from cuda_cnn import backends, nn
from cuda_cnn import functional as F
from cuda_cnn.ops.conv2d import algorithm


@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_over_every_argument(groups):
    x = small_integers(3, 2, 4, 7, 6, dtype=torch.float64, seed=0)
    weight = small_integers(3, 6, 4 // groups, 3, 3, dtype=torch.float64, seed=1)
    bias = small_integers(3, 6, dtype=torch.float64, seed=2)

    def function(x, weight, bias):
        loss = F.conv2d(x, weight, bias, stride=2, padding=1, groups=groups)
        return loss, torch.func.grad(
            lambda *t: F.conv2d(*t, 2, 1, 1, groups).pow(2).sum(), argnums=(0, 1, 2)
        )(x, weight, bias)

    for dims in itertools.product((None, 0), repeat=3):
        if dims == (None, None, None):
            continue
        tensors = [t if d == 0 else t[0] for t, d in zip((x, weight, bias), dims, strict=True)]
        y, gradients = torch.func.vmap(function, in_dims=dims)(*tensors)
        for i in range(3):
            one = [t[i] if d == 0 else t for t, d in zip(tensors, dims, strict=True)]
            y_one, gradients_one = function(*one)
            assert_bitwise(y[i], y_one, f"y, in_dims {dims}")
            for name, a, b in zip(("x", "weight", "bias"), gradients, gradients_one, strict=True):
                assert_bitwise(a[i], b, f"gradient of {name}, in_dims {dims}")


def test_per_sample_gradients():
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = reals(5, 3, 6, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(layer, parameters, (image[None],)).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, image).items():
            torch.testing.assert_close(ours[name][i], gradient, rtol=1e-12, atol=1e-12)


def test_forward_mode_raises():
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda t: F.conv2d(t, weight), (x,), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x, weight, dy = (
        lay_out(reals(*shape, dtype=torch.float32), layout).requires_grad_()
        for shape in ((2, 4, 7, 6), (6, 2, 3, 3), (2, 6, 4, 3))
    )
    bias, rest = reals(6, dtype=torch.float32).requires_grad_(), ([2, 2], [1, 1], [1, 1], 2)
    format = layout == "channels_last"
    torch.library.opcheck(torch.ops.cuda_cnn.conv2d.default, (x, weight, bias, *rest))
    torch.library.opcheck(torch.ops.cuda_cnn.conv2d.default, (x, weight, None, *rest))
    torch.library.opcheck(torch.ops.cuda_cnn.conv2d_input_grad.default, (dy, weight, x.shape, *rest, format))
    torch.library.opcheck(torch.ops.cuda_cnn.conv2d_weight_grad.default, (dy, x, weight.shape, *rest, format))
    torch.library.opcheck(torch.ops.cuda_cnn.conv2d_bias_grad.default, (dy,))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_compile_and_export(padding_mode):
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode=padding_mode)
    x = reals(2, 3, 9, 8, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x), layer(x))
    for a, b in zip(
        *(torch.autograd.grad(f(x).sum(), (x, layer.weight, layer.bias)) for f in (compiled, layer)),
        strict=True,
    ):
        assert_bitwise(a, b)
    assert_bitwise(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_module_is_torchs(padding_mode):
    arguments = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2}
    ours, theirs = (m.Conv2d(4, 6, **arguments, padding_mode=padding_mode).double() for m in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = small_integers(2, 4, 7, 8, dtype=torch.float64, seed=0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_autocast_gives_the_low_precision():
    x, layer = reals(2, 3, 6, 6, dtype=torch.float32), nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_flops_are_counted_as_torchs():
    counts = []
    for function in (F.conv2d, TORCH):
        x, weight = torch.ones(2, 4, 9, 9, requires_grad=True), torch.ones(6, 4, 3, 3, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            function(x, weight, stride=2).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_algorithms_can_be_asked_for_and_forced():
    assert algorithm("forward", (1, 64, 14, 14), (64, 64, 7, 7), padding=(3, 3)) == "gemm"
    stem, point = ((1, 3, 33, 33), (64, 3, 7, 7), (2, 2), (3, 3)), ((1, 64, 14, 14), (64, 64, 1, 1))
    deep = (1, 64, 14, 14), (64, 64, 7, 7), (1, 1), (3, 3)
    for direction in ("forward", "input_grad", "weight_grad"):
        names = [algorithm(direction, *call, nchw=True) for call in (point, stem, deep)]
        assert names == ["gemm_nchw", "few_channels" if direction == "input_grad" else "gemm_nchw", "gemm"]
    classifier = (4, 16, 5, 5), (120, 16, 5, 5)
    for direction, last in (("forward", "few_pixels"), ("input_grad", "few_pixels"), ("weight_grad", "gemm")):
        assert algorithm(direction, *classifier) == last
        assert algorithm(direction, *stem) == ("few_channels" if direction == "input_grad" else "winograd")
        with backends.flags(winograd=False):
            assert algorithm(direction, *stem) == "few_channels"
    with backends.flags(conv2d_algorithm="reference"):
        assert algorithm("forward", (1, 64, 14, 14), (64, 64, 5, 5)) == "reference"
    assert backends.conv2d_algorithm == "auto"
    with pytest.raises(ValueError, match="conv2d_algorithm that exists, got 'magic'"):
        backends.conv2d_algorithm = "magic"


def test_strides_are_torchs():
    shapes = [((2, 4, 6, 6), (8, 4, 3, 3)), ((1, 4, 6, 6), (1, 4, 1, 1)), ((2, 1, 5, 5), (8, 1, 3, 3))]
    shapes += [((2, 4, 1, 1), (8, 4, 1, 1)), ((0, 4, 6, 6), (8, 4, 3, 3)), ((1, 4, 3, 3), (8, 4, 3, 3))]
    for (x_shape, weight_shape), first, second in itertools.product(shapes, LAYOUTS, LAYOUTS):
        x = lay_out(reals(*x_shape, dtype=torch.float32), first)
        weight = lay_out(reals(*weight_shape, dtype=torch.float32), second)
        ours, theirs = F.conv2d(x, weight), TORCH(x, weight)
        assert ours.stride() == theirs.stride(), (x_shape, weight_shape, first, second)
    for layout in LAYOUTS:  # unbatched
        x = lay_out(reals(1, 4, 6, 6, dtype=torch.float32), layout)[0]
        weight = reals(8, 4, 3, 3, dtype=torch.float32)
        assert F.conv2d(x, weight).stride() == TORCH(x, weight).stride()


X, W = torch.ones(2, 4, 6, 6), torch.ones(8, 4, 3, 3)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: F.conv2d(X[0, 0], W), RuntimeError, r"input of 3 \(unbatched\) or 4 .* got 2"),
        (lambda: F.conv2d(X[None], W), RuntimeError, "dimensions, got 5"),
        (lambda: F.conv2d(X, W[0]), RuntimeError, "weight of 4 dimensions, got 3"),
        (lambda: F.conv2d(X[:, :3], W), RuntimeError, "input of 4 channels .* got 3"),
        (lambda: F.conv2d(X, W, groups=3), RuntimeError, "output channels in 3 groups"),
        (lambda: F.conv2d(X, W, groups=0), RuntimeError, "groups > 0, got 0"),
        (lambda: F.conv2d(X, W, groups=1.0), TypeError, "groups of whole numbers, got float"),
        (lambda: F.conv2d(X, W[:0]), RuntimeError, "output channels in 1 groups"),
        (lambda: F.conv2d(X, W[:, :, :0]), RuntimeError, "kernel of at least 1 x 1"),
        (
            lambda: F.conv2d(X, torch.ones(8, 4, 7, 7)),
            RuntimeError,
            "no larger than the padded input, got 7 against 6",
        ),
        (lambda: F.conv2d(X, W, dilation=3), RuntimeError, "got 7 against 6"),
        (lambda: F.conv2d(X, W, stride=0), RuntimeError, "stride > 0"),
        (lambda: F.conv2d(X, W, stride=-1), RuntimeError, "stride > 0"),
        (lambda: F.conv2d(X, W, stride=1.5), TypeError, "stride of whole numbers, got float"),
        (lambda: F.conv2d(X, W, stride=True), TypeError, "stride of whole numbers, got bool"),
        (lambda: F.conv2d(X, W, stride=None), TypeError, "stride of whole numbers, got NoneType"),
        (lambda: F.conv2d(X, W, stride=(1, 2, 3)), RuntimeError, "stride of one or two numbers"),
        (lambda: F.conv2d(X, W, padding=()), RuntimeError, "padding of one or two numbers"),
        (lambda: F.conv2d(X, W, padding=-1), RuntimeError, "padding >= 0"),
        (lambda: F.conv2d(X, W, padding=2**40), RuntimeError, "below 2.31"),
        (lambda: F.conv2d(X, W, padding="full"), RuntimeError, "got 'full'"),
        (lambda: F.conv2d(X, W, padding="same", stride=2), RuntimeError, 'stride 1 with padding "same"'),
        (lambda: F.conv2d(X, W, dilation=0), RuntimeError, "dilation > 0"),
        (lambda: F.conv2d(X, W, dilation=2**40), RuntimeError, "below 2.31"),
        (lambda: F.conv2d(X, W, torch.ones(7)), RuntimeError, r"bias of shape \[8\], got \[7\]"),
        (lambda: F.conv2d(X, W, torch.ones(8, 1)), RuntimeError, r"bias of shape \[8\], got \[8, 1\]"),
        (lambda: F.conv2d(X, W.double()), RuntimeError, "weight of dtype"),
        (lambda: F.conv2d(X, W, torch.ones(8).double()), RuntimeError, "bias of dtype"),
        (lambda: F.conv2d(X.int(), W.int()), RuntimeError, "of dtype float32.*got Int"),
        (lambda: F.conv2d(X.to_sparse(), W), RuntimeError, "dense"),
        (lambda: F.conv2d([1.0], W), TypeError, "input to be a Tensor, got list"),
        (lambda: F.conv2d(X, None), TypeError, "weight to be a Tensor, got NoneType"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_meta_tensors_have_shapes():
    assert F.conv2d(X.to("meta"), W.to("meta"), padding=1).shape == (2, 8, 6, 6)


@pytest.mark.parametrize(
    "x_shape, weight_shape", [((2, 0, 5, 5), (3, 0, 3, 3)), ((2, 4, 0, 3), (3, 4, 3, 3))]
)
def test_a_sum_over_nothing_is_zero(x_shape, weight_shape):
    """Without channels, or with padding alone; torch has no output channels for the one, and refuses the other."""
    x, weight = torch.ones(x_shape, requires_grad=True), torch.ones(weight_shape, requires_grad=True)
    bias = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = F.conv2d(x, weight, bias, padding=2)
    assert_bitwise(y, bias[:, None, None].expand(y.shape))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape and dweight.shape == weight.shape and not dweight.any()
    assert dbias.tolist() == [y.numel() / 3] * 3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_large_contiguous_weight_is_packed_as_one_in_channels_last(dtype, stride):
    """In place of being made channels_last first: the same bits, by matrix products and by Winograd's algorithm."""
    x, weight = reals(2, 99, 9, 11, dtype=dtype), reals(304, 99, 3, 3, dtype=dtype, seed=1)
    assert weight.numel() > 262144
    bias = reals(304, dtype=dtype, seed=2)
    x = x.to(memory_format=torch.channels_last)
    expected = F.conv2d(x, weight.to(memory_format=torch.channels_last), bias, stride, 1)
    assert_bitwise(F.conv2d(x, weight, bias, stride, 1), expected)
