"""Winograd rounds otherwise than a direct sum: its own bound, its switch, its independence of threads."""

import itertools

import pytest
import torch
from helpers import assert_bitwise, reals
from test_conv2d import TORCH, for_thread_counts, isa, with_gradients  # noqa: F401

from cuda_cnn import _C, backends
from cuda_cnn import functional as F
from cuda_cnn.ops.conv2d import algorithm

# x, weight, (stride, padding, dilation, groups)
WINOGRAD_CASES = {
    "whole tiles": ((2, 32, 16, 12), (48, 32, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "ragged tiles, odd channels": ((1, 33, 13, 7), (21, 33, 3, 3), ((1, 1), (1, 0), (1, 1), 1)),
    "wide padding": ((1, 16, 5, 6), (16, 16, 3, 3), ((1, 1), (3, 2), (1, 1), 1)),
    "groups": ((2, 36, 9, 10), (40, 18, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
    "filters over threads": ((1, 150, 14, 14), (96, 150, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "few tiles, sums in steps of channels": ((1, 260, 7, 9), (70, 260, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "U that is too large to be kept": (
        (1, 128, 46, 44),
        (260, 128, 3, 3),
        ((1, 1), (1, 1), (1, 1), 1),
    ),
    "several blocks of tiles": ((2, 16, 60, 58), (16, 16, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "5x5": ((2, 16, 14, 12), (48, 16, 5, 5), ((1, 1), (2, 2), (1, 1), 1)),
    "5x5, ragged tiles, odd channels": ((1, 33, 13, 8), (21, 33, 5, 5), ((1, 1), (0, 3), (1, 1), 1)),
    "5x5, groups, filters over threads": ((1, 300, 7, 7), (100, 150, 5, 5), ((1, 1), (2, 2), (1, 1), 2)),
    "5x5, blocks of tiles, one image": ((1, 48, 39, 54), (40, 48, 5, 5), ((1, 1), (1, 2), (1, 1), 1)),
    "5x5, many filters, three images": ((3, 144, 15, 13), (96, 144, 5, 5), ((1, 1), (2, 2), (1, 1), 1)),
    "4x4": ((2, 17, 11, 12), (21, 17, 4, 4), ((1, 1), (2, 1), (1, 1), 1)),
    "11x11 stride 4": ((3, 3, 75, 63), (21, 3, 11, 11), ((4, 4), (2, 2), (1, 1), 1)),
    "7x7 stride 2": ((2, 3, 36, 33), (33, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    "5x5 stride 2": ((2, 6, 21, 22), (18, 6, 5, 5), ((2, 2), (1, 2), (1, 1), 1)),
    "9x13 stride 2x3, wide padding": ((1, 2, 22, 31), (16, 2, 9, 13), ((2, 3), (7, 0), (1, 1), 1)),
    "stride, images one by one": ((3, 3, 430, 602), (16, 3, 8, 8), ((2, 2), (0, 0), (1, 1), 1)),
    "stride, bands of rows": ((2, 3, 640, 801), (16, 3, 8, 7), ((2, 2), (1, 2), (1, 1), 1)),
}


@pytest.mark.parametrize("case", WINOGRAD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_winograd_is_within_its_own_bound(isa, dtype, case):  # noqa: F811
    """Its error is that of its largest intermediate: 4e-6 of the largest sum, against 1e-6 for a direct one.

    16-bit results are such a sum rounded once. Both layouts have the same bits.
    """
    if dtype == torch.bfloat16 and isa == "avx512_bf16":
        pytest.skip("multiplies bfloat16 in pairs, which are rounded at the points")
    x_shape, weight_shape, geometry = WINOGRAD_CASES[case]
    x, weight = reals(*x_shape, dtype=dtype), reals(*weight_shape, dtype=dtype, seed=1)
    bias = reals(weight_shape[0], dtype=dtype, seed=2)
    dy = torch.randn_like(TORCH(x, weight, bias, *geometry))
    exact = with_gradients(TORCH, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    with backends.flags(conv2d_algorithm="winograd"):
        for direction in ("forward", "weight_grad"):
            assert algorithm(direction, x_shape, weight_shape, *geometry, dtype=dtype) == "winograd"
        ours = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
        layout = {"memory_format": torch.channels_last}
        of_nhwc = with_gradients(
            F.conv2d, x.to(**layout), weight.to(**layout), bias, geometry, dy.to(**layout)
        )
    for name, value in exact.items():
        rounding = value.abs() * torch.finfo(dtype).eps / 2
        error = ((ours[name].double() - value).abs() - rounding).max() / value.abs().max()
        assert error < 4e-6, f"{name}: {error:.3g}"
        assert_bitwise(of_nhwc[name], ours[name])


PAIRS = pytest.mark.skipif("avx512_bf16" not in _C.cpu_isas(), reason="no AVX512-BF16")
# 3×3 and 5×5 of stride 1 and whole pairs of channels.
PAIRS_CASES = [
    case
    for case, (_, (_, channels, *taps), (stride, *_)) in WINOGRAD_CASES.items()
    if taps in ([3, 3], [5, 5]) and stride == (1, 1) and channels % 2 == 0
]


@PAIRS
@pytest.mark.parametrize(
    "case", [*PAIRS_CASES, "ragged tiles, odd channels", "5x5, ragged tiles, odd channels"]
)
def test_winograd_in_bfloat16_is_within_its_own_bound(case):
    """Operands are rounded at the points, too: 8e-3 of the largest sum, against 4e-3 for a direct one."""
    x_shape, weight_shape, geometry = WINOGRAD_CASES[case]
    x, weight = reals(*x_shape, dtype=torch.bfloat16), reals(*weight_shape, dtype=torch.bfloat16, seed=1)
    bias = reals(weight_shape[0], dtype=torch.bfloat16, seed=2)
    dy = torch.randn_like(TORCH(x, weight, bias, *geometry))
    exact = with_gradients(TORCH, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    with backends.flags(conv2d_algorithm="winograd"):
        found = {
            direction: algorithm(direction, x_shape, weight_shape, *geometry, dtype=torch.bfloat16)
            for direction in ("forward", "input_grad", "weight_grad")
        }
        ours = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
    whole = (
        "gemm" if "odd" in case else "winograd"
    )  # no pairs of channels; the weight gradient's are of tiles
    assert found == {"forward": whole, "input_grad": whole, "weight_grad": "winograd"}
    for name, value in exact.items():
        error = (ours[name].double() - value).abs().max() / value.abs().max()
        assert error < 8e-3, f"{name}: {error:.3g}"


@PAIRS
@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("images", [2, 3])
@pytest.mark.parametrize("width", [13, 14, 15, 16])
def test_a_weight_gradient_in_bfloat16_is_within_twice_a_direct_sum(images, width, taps):
    """Pairs are of tiles that neighbour in a row, or of the batch's halves; with 0 where there is no other."""
    x, bias = (reals(*shape, dtype=torch.bfloat16) for shape in ((images, 32, 28, width), (40,)))
    weight = reals(40, 32, taps, taps, dtype=torch.bfloat16, seed=1)
    geometry = ((1, 1), (taps // 2, taps // 2), (1, 1), 1)
    dy = torch.randn_like(TORCH(x, weight, bias, *geometry))
    exact = with_gradients(TORCH, *(t.double() for t in (x, weight, bias)), geometry, dy.double())
    ours = {}
    for name in ("winograd", "gemm"):
        with backends.flags(conv2d_algorithm=name):
            found = with_gradients(F.conv2d, x, weight, bias, geometry, dy)
        ours[name] = (found["dweight"].double() - exact["dweight"]).square().mean().sqrt()
    assert ours["winograd"] < 2 * ours["gemm"]


@PAIRS
def test_in_bfloat16_the_weight_gradient_of_few_pixels_is_of_direct_sums():
    for size, expected in ((28, "winograd"), (7, "gemm")):
        shapes, options = ((2, 64, size, size), (64, 64, 3, 3)), {"padding": (1, 1), "dtype": torch.bfloat16}
        assert algorithm("weight_grad", *shapes, **options) == expected
        for direction in ("forward", "input_grad"):
            assert algorithm(direction, *shapes, **options) == "winograd"


@PAIRS
def test_in_bfloat16_5x5_of_short_rows_is_of_direct_sums():
    for size, expected in ((14, "winograd"), (7, "gemm")):
        shapes, options = ((2, 64, size, size), (64, 64, 5, 5)), {"padding": (2, 2), "dtype": torch.bfloat16}
        for direction in ("forward", "input_grad", "weight_grad"):
            assert algorithm(direction, *shapes, **options) == expected


@PAIRS
def test_a_weight_gradient_of_5x5_in_bfloat16_reads_nothing_behind_its_tiles():
    """The scratch memory may hold anything, NaN of an earlier call, too; 0 times that is to stay 0."""
    geometry = ((1, 1), (2, 2), (1, 1), 1)
    weight = reals(32, 32, 5, 5, dtype=torch.bfloat16, seed=1)
    bias = reals(32, dtype=torch.bfloat16)
    with backends.flags(conv2d_algorithm="winograd"):
        for rows, value in ((40, float("nan")), (14, 1.0)):
            x = torch.full((2, 32, rows, 28), value, dtype=torch.bfloat16)
            found = with_gradients(F.conv2d, x, weight, bias, geometry, torch.ones_like(x))
    assert found["dweight"].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *((dtype, case) for dtype in (torch.float32, torch.float16) for case in WINOGRAD_CASES),
        *(pytest.param(torch.bfloat16, case, marks=PAIRS) for case in PAIRS_CASES),
    ],
)
def test_winograd_does_not_know_how_many_threads(dtype, case):
    x_shape, weight_shape, geometry = WINOGRAD_CASES[case]
    x, weight = reals(*x_shape, dtype=dtype), reals(*weight_shape, dtype=dtype, seed=1)
    bias = reals(weight_shape[0], dtype=dtype, seed=2)
    dy = reals(*TORCH(x, weight, bias, *geometry).shape, dtype=dtype, seed=3)
    with backends.flags(conv2d_algorithm="winograd"):
        results = for_thread_counts(lambda: with_gradients(F.conv2d, x, weight, bias, geometry, dy))
    for other, name in itertools.product(results[1:], results[0]):
        assert_bitwise(other[name], results[0][name], what=f"{name} of {case}")


def test_a_weight_gradient_of_few_tiles_is_a_matrix_product():
    shapes = (64, 7, 7), (64, 64, 3, 3)
    for images, expected in ((1, "gemm"), (2, "winograd")):
        x_shape = (images, *shapes[0])
        assert algorithm("forward", x_shape, shapes[1], padding=(1, 1)) == "winograd"
        assert algorithm("weight_grad", x_shape, shapes[1], padding=(1, 1)) == expected


def test_winograd_is_chosen_where_it_may_be_and_can_be_switched_off():
    shapes = (2, 64, 28, 28), (64, 64, 3, 3)
    for direction in ("forward", "input_grad", "weight_grad"):
        assert algorithm(direction, *shapes, padding=(1, 1)) == "winograd"
        assert algorithm(direction, (2, 16, 28, 28), (32, 16, 5, 5), padding=(2, 2)) == "winograd"
        assert algorithm(direction, *shapes, padding=(1, 1), dtype=torch.float16) == "winograd"
        assert algorithm(direction, *shapes, padding=(1, 1), dtype=torch.float64) == "gemm"
        assert algorithm(direction, *shapes, stride=(2, 2)) == "gemm"
        with backends.flags(winograd=False):
            assert algorithm(direction, *shapes, padding=(1, 1)) == "gemm"
    assert backends.winograd


def test_a_stem_is_taken_in_blocks_of_its_stride():
    stems = {  # x, weight, stride, padding, and whether NCHW is worth its conversions
        "AlexNet": ((1, 3, 227, 227), (96, 3, 11, 11), 4, 0, True),
        "ResNet": ((1, 3, 224, 224), (64, 3, 7, 7), 2, 3, False),
    }
    for x, weight, stride, padding, converted in stems.values():
        options = {"stride": (stride, stride), "padding": (padding, padding)}
        for direction in ("forward", "weight_grad"):
            assert algorithm(direction, x, weight, **options) == "winograd"
            expected = "winograd" if converted else "gemm_nchw"
            assert algorithm(direction, x, weight, **options, nchw=True) == expected
            assert algorithm(direction, x, weight, **options, mapped=True) != "winograd"
            assert algorithm(direction, x, weight, **options, dtype=torch.float16) == "winograd"
            pairs = _C.cpu_isa() == "avx512_bf16"
            found = algorithm(direction, x, weight, **options, dtype=torch.bfloat16)
            assert (found != "winograd") == pairs
        assert algorithm("input_grad", x, weight, **options) == "few_channels"


def test_a_stem_in_blocks_takes_channels_of_a_wider_image_and_writes_into_one():
    geometry = ((2, 2), (3, 3), (1, 1), 1)
    wide = reals(2, 8, 33, 30, dtype=torch.float32).to(memory_format=torch.channels_last)
    x, weight = wide[:, 2:5], reals(16, 3, 7, 7, dtype=torch.float32, seed=1)
    bias = reals(16, dtype=torch.float32, seed=2)
    expected = TORCH(*(t.double() for t in (x, weight, bias)), *geometry)
    out = torch.full((2, 48, *expected.shape[2:]), 7.0).to(memory_format=torch.channels_last)
    operators = torch.ops.cuda_cnn
    packed = operators.conv2d_pack(weight, 1)
    with backends.flags(conv2d_algorithm="winograd"):
        operators.conv2d_packed_(
            out[:, 16:32], x, weight, packed, bias, None, None, False, None, True, *geometry
        )
    torch.testing.assert_close(
        out[:, 16:32].double(), expected.relu(), rtol=0, atol=4e-6 * expected.abs().max()
    )
    assert (out[:, :16] == 7).all() and (out[:, 32:] == 7).all()
