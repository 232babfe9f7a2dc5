import functools
import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, ROUNDOFF, assert_bitwise, integers, lay_out, reals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from cuda_cnn import _C, backends, nn, reference
from cuda_cnn import functional as F
from cuda_cnn.ops.conv2d import algorithm

ISAS = _C.cpu_isas()
TORCH = torch.nn.functional.conv2d

# x, weight, (stride, padding, dilation, groups)
CASES = {
    "lenet c1": ((2, 1, 12, 12), (6, 1, 5, 5), ((1, 1), (0, 0), (1, 1), 1)),
    "primes": ((3, 7, 11, 13), (17, 7, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "one of everything": ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1": ((2, 33, 5, 3), (35, 33, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1 stride 2": ((2, 16, 7, 6), (19, 16, 1, 1), ((2, 2), (0, 0), (1, 1), 1)),
    "stem": ((1, 3, 19, 23), (10, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    "alexnet conv1": ((1, 3, 27, 31), (13, 3, 11, 11), ((4, 4), (2, 2), (1, 1), 1)),
    "stride beyond the kernel": ((2, 5, 13, 11), (6, 5, 2, 3), ((5, 4), (0, 1), (1, 1), 1)),
    "padding beyond the kernel": ((1, 3, 4, 5), (4, 3, 2, 2), ((1, 2), (3, 4), (1, 1), 1)),
    "dilation": ((2, 6, 15, 14), (5, 6, 3, 3), ((1, 1), (2, 3), (2, 3), 1)),
    "stride and dilation share a factor": ((1, 4, 17, 19), (3, 4, 3, 4), ((2, 6), (3, 1), (4, 4), 1)),
    "stride and dilation do not": ((1, 4, 17, 19), (3, 4, 4, 3), ((3, 2), (1, 2), (2, 3), 1)),
    "groups": ((2, 12, 7, 9), (15, 4, 3, 5), ((1, 2), (1, 2), (1, 1), 3)),
    "depthwise": ((2, 37, 9, 8), (37, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 37)),
    "depthwise stride 2, multiplier 2": ((2, 9, 9, 8), (18, 1, 5, 3), ((2, 2), (2, 0), (1, 1), 9)),
    "two blocks of depth": ((1, 70, 6, 5), (8, 70, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "blocks within a tap": ((1, 401, 3, 4), (34, 401, 2, 1), ((1, 1), (1, 0), (1, 1), 1)),
    "wide": ((1, 5, 2, 70), (33, 5, 1, 3), ((1, 1), (0, 1), (1, 1), 1)),
    "empty batch": ((0, 3, 5, 5), (4, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
}


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def with_gradients(function, x, weight, bias, geometry, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, *geometry)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def make(case, kind, dtype, seed=0):
    x_shape, weight_shape, geometry = CASES[case]
    x, weight = kind(*x_shape, dtype=dtype, seed=seed), kind(*weight_shape, dtype=dtype, seed=seed + 1)
    bias = kind(weight_shape[0], dtype=dtype, seed=seed + 2)
    y = TORCH(x.to("meta"), weight.to("meta"), None, *geometry)
    return x, weight, bias, geometry, kind(*y.shape, dtype=dtype, seed=seed + 3)


def small_integers(*shape, dtype, seed):
    return integers(*shape, dtype=dtype, low=-2, high=3, seed=seed)


@functools.cache
def exact_integers(case):
    x, weight, bias, geometry, dy = make(case, small_integers, torch.float64)
    return with_gradients(reference.conv2d, x, weight, bias, geometry, dy)


def check_bitwise(case, dtype, layout, device="cpu"):
    x, weight, bias, geometry, dy = make(case, small_integers, dtype)
    x, weight, dy = (lay_out(t.to(device), layout) for t in (x, weight, dy))
    actual = with_gradients(F.conv2d, x, weight, bias.to(device), geometry, dy)
    for name, value in exact_integers(case).items():
        assert_bitwise(actual[name], value.to(dtype), what=f"{name} of {case}, {layout}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(device, case, dtype):
    """Sums of whole numbers have no rounding: every algorithm but Winograd must give them bit for bit."""
    with backends.flags(winograd=False):
        check_bitwise(case, dtype, "channels_last", device)


@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_are_exact_in_every_instruction_set_and_layout(isa, case):
    with backends.flags(winograd=False):
        for dtype, layout in zip(itertools.cycle(DTYPES), LAYOUTS):
            check_bitwise(case, dtype, layout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gemm", "depthwise", "reference"])
def test_every_algorithm_is_exact(isa, case, name):
    with backends.flags(conv2d_algorithm=name):
        for dtype in (torch.float32, torch.bfloat16):
            check_bitwise(case, dtype, "channels_last")


def error_bound(depth, dtype, size):
    """γ_K·(|x|⋆|w|), the worst that sums of K products can round to, and the rounding of the result."""
    accumulator = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return (2 * (depth + 2) * accumulator + ROUNDOFF[dtype]) * size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_numbers_are_within_the_bound_of_their_sums(isa, case, dtype):
    x, weight, bias, geometry, dy = make(case, reals, dtype)
    exact = with_gradients(reference.conv2d, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    size = with_gradients(
        reference.conv2d, *(t.double().abs() for t in (x, weight, bias)), geometry, dy.double().abs()
    )
    taps, pixels = weight[0].numel(), dy.shape[0] * dy.shape[2] * dy.shape[3]
    depth = {"y": taps, "dx": taps * weight.shape[0], "dweight": pixels, "dbias": pixels}
    with backends.flags(winograd=False):
        actual = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
    for name, value in exact.items():
        difference = (actual[name].double() - value).abs()
        bad = difference > error_bound(depth[name], dtype, size[name])
        assert not bad.any(), f"{name} of {case} at {bad.nonzero()[0].tolist()}: {difference[bad][0]:.3g}"


@pytest.mark.parametrize("case", ["two blocks of depth", "blocks within a tap", "1x1", "stem"])
def test_errors_are_like_torchs(case):
    """Largest error against float64: no more than twice torch's, for many images, so that sums are long."""
    x_shape, weight_shape, geometry = CASES[case]
    x = reals(16, *x_shape[1:], dtype=torch.float32)
    weight, bias = (
        reals(*weight_shape, dtype=torch.float32, seed=1),
        reals(weight_shape[0], dtype=torch.float32),
    )
    dy = torch.randn_like(TORCH(x, weight, None, *geometry))
    exact = with_gradients(TORCH, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    with backends.flags(winograd=False):
        ours = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
    torchs = with_gradients(TORCH, x, weight, bias, geometry, dy)
    for name, value in exact.items():
        mine, others = ((t[name].double() - value).abs().max() for t in (ours, torchs))
        assert mine <= 2 * others + 8 * ROUNDOFF[torch.float32] * value.abs().mean(), (name, mine, others)


def for_thread_counts(function):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.parametrize("case", list(CASES))
def test_threads_do_not_change_a_bit(case):
    x, weight, bias, geometry, dy = make(case, reals, torch.float32)
    x, dy = x.repeat(5, 1, 1, 1), dy.repeat(5, 1, 1, 1)
    results = for_thread_counts(lambda: with_gradients(F.conv2d, x, weight, bias, geometry, dy))
    for other, name in itertools.product(results[1:], results[0]):
        assert_bitwise(other[name], results[0][name], what=f"{name} of {case}")


WINOGRAD_CASES = {
    "whole tiles": ((2, 32, 16, 12), (48, 32, 3, 3), (1, 1), 1),
    "ragged tiles, odd channels": ((1, 33, 13, 7), (21, 33, 3, 3), (1, 0), 1),
    "wide padding": ((1, 16, 5, 6), (16, 16, 3, 3), (3, 2), 1),
    "groups": ((2, 36, 9, 10), (40, 18, 3, 3), (1, 1), 2),
    "filters over threads": ((1, 150, 14, 14), (96, 150, 3, 3), (1, 1), 1),
    "several blocks of tiles": ((2, 16, 60, 58), (16, 16, 3, 3), (1, 1), 1),
}


@pytest.mark.parametrize("case", WINOGRAD_CASES)
def test_winograd_is_within_its_own_bound(isa, case):
    """Its error is that of its largest intermediate: 4e-6 of the largest sum, against 1e-6 for a direct one."""
    x_shape, weight_shape, padding, groups = WINOGRAD_CASES[case]
    geometry = ((1, 1), padding, (1, 1), groups)
    x, weight = reals(*x_shape, dtype=torch.float32), reals(*weight_shape, dtype=torch.float32, seed=1)
    bias = reals(weight_shape[0], dtype=torch.float32, seed=2)
    dy = torch.randn_like(TORCH(x, weight, bias, *geometry))
    exact = with_gradients(TORCH, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    with backends.flags(conv2d_algorithm="winograd"):
        assert algorithm("forward", x_shape, weight_shape, padding=padding, groups=groups) == "winograd"
        ours = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
    for name, value in exact.items():
        error = (ours[name].double() - value).abs().max() / value.abs().max()
        assert error < 4e-6, f"{name}: {error:.3g}"


@pytest.mark.parametrize("case", WINOGRAD_CASES)
def test_winograd_does_not_know_how_many_threads(case):
    x_shape, weight_shape, padding, groups = WINOGRAD_CASES[case]
    x, weight = reals(*x_shape, dtype=torch.float32), reals(*weight_shape, dtype=torch.float32, seed=1)
    bias, geometry = reals(weight_shape[0], dtype=torch.float32, seed=2), ((1, 1), padding, (1, 1), groups)
    dy = reals(*TORCH(x, weight, bias, *geometry).shape, dtype=torch.float32, seed=3)
    with backends.flags(conv2d_algorithm="winograd"):
        results = for_thread_counts(lambda: with_gradients(F.conv2d, x, weight, bias, geometry, dy))
    for other, name in itertools.product(results[1:], results[0]):
        assert_bitwise(other[name], results[0][name], what=f"{name} of {case}")


def test_winograd_is_chosen_where_it_may_be_and_can_be_switched_off():
    shapes = (2, 64, 28, 28), (64, 64, 3, 3)
    for direction in ("forward", "input_grad", "weight_grad"):
        assert algorithm(direction, *shapes, padding=(1, 1)) == "winograd"
        assert algorithm(direction, *shapes, padding=(1, 1), dtype=torch.float64) == "gemm"
        assert algorithm(direction, *shapes, stride=(2, 2)) == "gemm"
        with backends.flags(winograd=False):
            assert algorithm(direction, *shapes, padding=(1, 1)) == "gemm"
    assert backends.winograd


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


def test_a_slice_of_channels_is_read_in_place_and_its_neighbours_are_not():
    wide = torch.full((2, 20, 6, 5), float("nan")).contiguous(memory_format=torch.channels_last)
    x, weight = (
        small_integers(2, 7, 6, 5, dtype=torch.float32, seed=0),
        small_integers(9, 7, 3, 3, dtype=torch.float32, seed=1),
    )
    wide[:, 3:10] = x
    assert_bitwise(F.conv2d(wide[:, 3:10], weight, padding=1), reference.conv2d(x, weight, padding=(1, 1)))


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0), [1]])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_arguments_as_torch_takes_them(padding, dilation):
    for size in ((3, 3), (2, 4), (1, 5)):
        x = small_integers(2, 3, 16, 17, dtype=torch.float32, seed=0)
        weight = small_integers(4, 3, *size, dtype=torch.float32, seed=1)
        for image in (x, x[0]):
            ours = F.conv2d(image, weight, padding=padding, dilation=dilation)
            assert_bitwise(ours, TORCH(image, weight, padding=padding, dilation=dilation))


def test_the_worked_example_of_shapes():
    assert F.conv2d(torch.ones(1, 4, 5, 5), torch.ones(8, 4, 3, 3), padding=1).shape == (1, 8, 5, 5)


@pytest.mark.parametrize(
    "case", ["one of everything", "groups", "stride and dilation share a factor", "dilation"]
)
def test_derivatives(device, case):
    (n, c, h, w), (*_, r, s), (stride, padding, dilation, groups) = CASES[case]
    groups = min(groups, 2)
    x = (
        reals(n, 2 * groups if c > 1 else 1, min(h, 9), min(w, 13), dtype=torch.float64)
        .to(device)
        .requires_grad_()
    )
    weight = (
        reals(2 * groups, x.shape[1] // groups, r, s, dtype=torch.float64, seed=1).to(device).requires_grad_()
    )
    bias = reals(2 * groups, dtype=torch.float64, seed=2).to(device).requires_grad_()

    def function(*tensors):
        return F.conv2d(*tensors, stride, padding, dilation, groups)

    assert gradcheck(function, (x, weight, bias), fast_mode=True)
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


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


def test_not_a_number_and_infinity_stay_in_their_windows(device):
    x = torch.ones(1, 3, 9, 9, device=device)
    x[0, 1, 4, 4], x[0, 2, 0, 0] = float("nan"), float("inf")
    with backends.flags(winograd=False):
        y = F.conv2d(x, torch.ones(2, 3, 3, 3, device=device), padding=1)
    assert y.isnan()[0, 0].nonzero().tolist() == [[i, j] for i in (3, 4, 5) for j in (3, 4, 5)]
    assert y.isinf()[0, 1].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@settings(deadline=None)
@given(data=st.data())
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    x_shape = (draw(0, 3), groups * draw(1, 40), draw(1, 12), draw(1, 20))
    taps = (draw(1, 5), draw(1, 5))
    stride, padding, dilation = ((draw(1, 4), draw(1, 4)) for _ in range(3))
    if any(x_shape[2 + i] + 2 * padding[i] < dilation[i] * (taps[i] - 1) + 1 for i in (0, 1)):
        return
    weight_shape = (groups * draw(1, 40), x_shape[1] // groups, *taps)
    case = f"{x_shape} {weight_shape} {stride} {padding} {dilation} {groups}"
    CASES[case] = (x_shape, weight_shape, (stride, padding, dilation, groups))
    try:
        with backends.flags(winograd=False):
            check_bitwise(case, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS)))
    finally:
        del CASES[case]


def test_algorithms_can_be_asked_for_and_forced():
    assert algorithm("forward", (1, 64, 14, 14), (64, 64, 5, 5), padding=(2, 2)) == "gemm"
    with backends.flags(conv2d_algorithm="reference"):
        assert algorithm("forward", (1, 64, 14, 14), (64, 64, 5, 5)) == "reference"
    assert backends.conv2d_algorithm == "auto"
    with pytest.raises(ValueError, match="conv2d_algorithm that exists, got 'magic'"):
        backends.conv2d_algorithm = "magic"


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
