import functools
import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, ROUNDOFF, assert_bitwise, integers, lay_out, reals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import _C, backends, reference
from cuda_cnn import functional as F

ISAS = _C.cpu_isas()
TORCH = torch.nn.functional.conv2d

# x, weight, (stride, padding, dilation, groups)
CASES = {
    "lenet c1": ((2, 1, 12, 12), (6, 1, 5, 5), ((1, 1), (0, 0), (1, 1), 1)),
    "primes": ((3, 7, 11, 13), (17, 7, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "one of everything": ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1": ((2, 33, 5, 3), (35, 33, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1, long sums, images that end within a tile": (
        (3, 203, 7, 7),
        (23, 203, 1, 1),
        ((1, 1), (0, 0), (1, 1), 1),
    ),
    "1x1, filters that share a set of L1": ((2, 1024, 3, 5), (31, 1024, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1, groups, odd pixels": ((3, 18, 3, 11), (21, 6, 1, 1), ((1, 1), (0, 0), (1, 1), 3)),
    "1x1, more filters than pixels": ((1, 70, 3, 5), (131, 70, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "1x1 stride 3, padding": ((2, 9, 8, 13), (14, 9, 1, 1), ((2, 3), (1, 2), (1, 1), 1)),
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
    "depthwise, runs inside and at the edges": ((2, 21, 5, 15), (21, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 21)),
    "depthwise stride 2": ((2, 24, 9, 21), (24, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 24)),
    "depthwise, parts of the channels": ((2, 275, 7, 6), (275, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 275)),
    "depthwise, kernel beyond the image": ((1, 33, 4, 5), (33, 1, 7, 7), ((1, 1), (3, 3), (1, 1), 33)),
    "depthwise, one row": ((2, 33, 1, 9), (33, 1, 3, 5), ((1, 1), (1, 2), (1, 1), 33)),
    "depthwise, stride beyond the kernel": ((2, 37, 9, 17), (37, 1, 2, 3), ((3, 4), (0, 1), (1, 1), 37)),
    "depthwise stride 2, multiplier 2": ((2, 9, 9, 8), (18, 1, 5, 3), ((2, 2), (2, 0), (1, 1), 9)),
    "groups of 2": ((1, 22, 9, 11), (22, 2, 5, 3), ((2, 1), (2, 1), (1, 2), 11)),
    "groups of 4": ((2, 36, 9, 10), (36, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 9)),
    "groups of 8": ((1, 40, 7, 12), (40, 8, 3, 4), ((1, 2), (1, 1), (1, 1), 5)),
    "two blocks of depth": ((1, 130, 6, 5), (8, 130, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "blocks within a tap": ((1, 1031, 3, 4), (34, 1031, 2, 1), ((1, 1), (1, 0), (1, 1), 1)),
    "fully connected": ((5, 1030, 1, 1), (133, 1030, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "few pixels": ((3, 41, 2, 2), (29, 41, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "wide": ((1, 5, 2, 70), (33, 5, 1, 3), ((1, 1), (0, 1), (1, 1), 1)),
    "few channels, many rows": ((2, 2, 41, 50), (3, 2, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "few channels, bands of rows": ((1, 3, 17, 700), (5, 3, 3, 3), ((2, 1), (1, 1), (1, 1), 1)),
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


@pytest.mark.parametrize("case", ["1x1 stride 2", "groups of 8", "depthwise", "lenet c1"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "offset", "slice"])
def test_layouts_and_misaligned_addresses(device, case, layout):
    with backends.flags(winograd=False):
        for dtype in DTYPES:
            check_bitwise(case, dtype, layout, device)


@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_are_exact_in_every_instruction_set_and_layout(isa, case):
    with backends.flags(winograd=False):
        for dtype, layout in zip(itertools.cycle(DTYPES), LAYOUTS):
            check_bitwise(case, dtype, layout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gemm", "few_pixels", "few_channels", "depthwise", "reference"])
def test_every_algorithm_is_exact(isa, case, name):
    with backends.flags(conv2d_algorithm=name):
        for dtype in (torch.float32, torch.bfloat16):
            check_bitwise(case, dtype, "channels_last")


@pytest.mark.parametrize("case", CASES)
def test_nchw_as_it_lies_is_exact(isa, case):
    with backends.flags(conv2d_algorithm="gemm_nchw"):
        for dtype in DTYPES:
            check_bitwise(case, dtype, "contiguous")


@pytest.mark.parametrize("case", ["groups of 2", "groups of 4", "groups of 8"])
def test_infinity_stays_in_its_group(isa, case):
    """Groups that share a vector share no sum: not even 0 * Inf."""
    x, weight, bias, geometry, dy = make(case, small_integers, torch.float32)
    x[:, 3], dy[:, 3] = float("inf"), float("inf")
    size = weight.shape[1]
    ours = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
    for name, axis in (("y", 1), ("dx", 1), ("dweight", 0)):
        finite = ours[name].isfinite().movedim(axis, 0).flatten(1).all(1)
        hit = {3 // size * size + i for i in range(size)}
        assert all(finite[i] for i in range(len(finite)) if i not in hit), f"{name} of {case}"
        assert not finite[3], f"{name} of {case}: Inf was lost"


def test_infinity_that_no_tap_reads_stays_out(isa):
    """Pairs of rows of which the last one is missing read no row in its place."""
    x = torch.ones(2, 3, 8, 40).to(memory_format=torch.channels_last)
    x[:, :, 7] = float("inf")
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), ("auto", "gemm", "few_channels")):
        dy, size = torch.ones(2, 5, 3, 19, dtype=dtype), (5, 3, 3, 3)
        with backends.flags(conv2d_algorithm=name):
            ours = torch.ops.cuda_cnn.conv2d_weight_grad(
                dy, x.to(dtype), size, (2, 2), (0, 0), (1, 1), 1, True
            )
        assert torch.equal(ours, torch.full(size, 2 * 3 * 19, dtype=dtype)), (dtype, name)


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
    dy = reals(*TORCH(x, weight, None, *geometry).shape, dtype=torch.float32, seed=3)
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


@pytest.mark.parametrize("algorithm", ["auto", "gemm_nchw"])
@pytest.mark.parametrize("case", list(CASES))
def test_threads_do_not_change_a_bit(case, algorithm):
    x, weight, bias, geometry, dy = make(case, reals, torch.float32)
    x, dy = x.repeat(5, 1, 1, 1), dy.repeat(5, 1, 1, 1)
    with backends.flags(conv2d_algorithm=algorithm):
        results = for_thread_counts(lambda: with_gradients(F.conv2d, x, weight, bias, geometry, dy))
    for other, name in itertools.product(results[1:], results[0]):
        assert_bitwise(other[name], results[0][name], what=f"{name} of {case}")


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
