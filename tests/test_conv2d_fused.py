import itertools

import pytest
import torch
from helpers import DTYPES, assert_accurate, assert_bitwise, integers, lay_out, reals
from test_conv2d import CASES
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import _C, reference
from cuda_cnn import functional as F
from cuda_cnn.ops.conv2d_fused import conv2d_fused_of_maps
from cuda_cnn.ops.conv2d_norm import conv2d_norm

# Geometries at large are test_conv2d's; here one of each way through the kernels.
CASES = {
    **{
        name: CASES[name]
        for name in (
            "primes",
            "one of everything",
            "1x1",
            "1x1 stride 2",
            "groups",
            "depthwise",
            "empty batch",
        )
    },
    "stem": ((1, 3, 9, 11), (20, 3, 5, 5), ((2, 2), (2, 2), (1, 2), 1)),
    "few channels": ((2, 3, 9, 11), (5, 3, 5, 4), ((2, 1), (2, 2), (1, 2), 1)),
    "winograd": ((2, 19, 9, 7), (33, 19, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
}
FLAGS = [  # in_scale and in_shift, in_relu, residual, out_relu
    (True, True, False, False),
    (True, False, True, True),
    (False, True, True, False),
    (False, False, False, True),
]


def output_shape(case):
    x_shape, weight_shape, geometry = CASES[case]
    meta = [torch.empty(shape, device="meta") for shape in (x_shape, weight_shape)]
    return torch.nn.functional.conv2d(*meta, None, *geometry).shape


def make(case, kind, dtype, flags, device="cpu", seed=0):
    x_shape, weight_shape, geometry = CASES[case]
    prologue, in_relu, residual, out_relu = flags
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, bias = (
        kind(*shape, dtype=dtype, seed=seed + i)
        for i, shape in enumerate((x_shape, weight_shape, weight_shape[:1]))
    )
    scale, shift = (kind(x_shape[1], dtype=vector, seed=seed + 3 + i) if prologue else None for i in (0, 1))
    added = kind(*output_shape(case), dtype=dtype, seed=seed + 5) if residual else None
    tensors = [t if t is None else t.to(device) for t in (x, weight, bias, scale, shift, added)]
    return tensors, (in_relu, out_relu), geometry


def call(function, tensors, relus, geometry, **options):
    x, weight, bias, scale, shift, added = tensors
    return function(x, weight, bias, scale, shift, relus[0], added, relus[1], *options.values(), *geometry)


def with_gradients(function, tensors, relus, geometry, grads, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = call(function, leaves, relus, geometry, **options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=False)]
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
    names = ("dx", "dweight", "dbias", "dscale", "dshift", "dresidual")
    return list(outputs), {n: next(found) for n, t in zip(names, leaves, strict=True) if t is not None}


def small(*shape, dtype, seed):
    return integers(*shape, dtype=dtype, low=-1, high=2, seed=seed)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_bitwise(device, case, flags):
    if case == "winograd":
        pytest.skip("rounds")
    exact, *rest = make(case, small, torch.float64, flags)
    dy = small(*output_shape(case), dtype=torch.float64, seed=9)
    (y, *_), gradients = with_gradients(reference.conv2d_fused, exact, *rest, [dy])
    tensors, *rest = make(case, small, torch.float32, flags, device)
    (actual, *_), found = with_gradients(F.conv2d_fused, tensors, *rest, [dy.to(device)], want_stats=False)
    assert_bitwise(actual, y.float(), what=f"y of {case}")
    for name, value in gradients.items():
        assert_bitwise(found[name], value.float(), what=f"{name} of {case}")


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize(
    "case", ["primes", "winograd", "1x1 stride 2", "depthwise", "groups", "few channels"]
)
def test_statistics_and_gradients(device, case, flags):
    exact, *rest = make(case, reals, torch.float64, flags)
    shape = output_shape(case)
    grads = [
        reals(*s, dtype=torch.float64, seed=9 + i) for i, s in enumerate((shape, shape[1:2], shape[1:2]))
    ]
    outputs, gradients = with_gradients(reference.conv2d_fused, exact, *rest, grads)
    # Away from the ReLU's edge, so that rounding cannot flip a mask.
    grads[0] = grads[0] * (outputs[0].abs() > 1e-3) if rest[0][1] else grads[0]
    outputs, gradients = with_gradients(reference.conv2d_fused, exact, *rest, grads)
    tensors = [None if t is None else t.float().to(device) for t in exact]
    grads = [g.to(device) for g in grads]
    actual, found = with_gradients(F.conv2d_fused, tensors, *rest, grads, want_stats=True)
    for name, value, expected in zip(("y", "mean", "var"), actual, outputs, strict=True):
        assert_accurate(value, expected, ulps=400 if case == "winograd" else 60, what=f"{name} of {case}")
    for name, value in gradients.items():
        assert_accurate(found[name], value, ulps=200, what=f"{name} of {case}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, dtype):
    flags = (True, True, True, True)
    exact, *rest = make("primes", small, torch.float64, flags)
    exact[1] = exact[1] * (small(*exact[1].shape, dtype=torch.float64, seed=7) == 0)  # sums below 2⁸
    dy = small(*output_shape("primes"), dtype=torch.float64, seed=9)
    dy = dy * (small(*dy.shape, dtype=torch.float64, seed=8) == 1)
    (y, mean, var), gradients = with_gradients(reference.conv2d_fused, exact, *rest, [dy])
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.to(device, vector if i in (3, 4) else dtype) for i, t in enumerate(exact)]
    actual = call(F.conv2d_fused, tensors, *rest, want_stats=True)
    assert_bitwise(actual[0], y.to(dtype), what="y")
    assert actual[1].dtype == actual[2].dtype == vector
    assert_accurate(actual[1], mean, what="mean")
    assert_accurate(actual[2], var, ulps=400, what="var")  # a chain of all pixels
    _, found = with_gradients(F.conv2d_fused, tensors, *rest, [dy.to(device)], want_stats=False)
    for name, value in gradients.items():
        if value.abs().max() < 256:  # exact in every dtype
            assert_bitwise(found[name], value.to(found[name].dtype), what=name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "channels"])
def test_layouts(device, layout):
    def place(t):
        if layout != "channels":
            return lay_out(t, layout)
        wide = torch.full((t.shape[0], t.shape[1] + 5, *t.shape[2:]), float("nan"))
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 2:-3] = t
        return wide[:, 2:-3]

    tensors, *rest = make("1x1", small, torch.float32, (True, True, True, True))
    dy = small(*output_shape("1x1"), dtype=torch.float32, seed=9)
    expected, gradients = with_gradients(F.conv2d_fused, tensors, *rest, [dy], want_stats=True)
    placed = [place(t).to(device) if t.dim() == 4 else t.to(device) for t in tensors]
    actual, found = with_gradients(F.conv2d_fused, placed, *rest, [place(dy).to(device)], want_stats=True)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for value, other in zip(actual, expected, strict=True):
        assert_bitwise(value, other)
    for name in gradients:
        assert_bitwise(found[name], gradients[name], what=name)


def differentiable(case, flags, device, want_stats):
    tensors, relus, geometry = make(case, reals, torch.float64, flags, device)
    present = [i for i, t in enumerate(tensors) if t is not None]

    def function(*given):
        full = [None] * 6
        for i, t in zip(present, given, strict=True):
            full[i] = t
        outputs = call(F.conv2d_fused, full, relus, geometry, want_stats=want_stats)
        return outputs if want_stats else outputs[0]

    return function, [tensors[i].requires_grad_() for i in present]


SMALL = {
    "small": ((2, 3, 4, 5), (4, 3, 3, 2), ((2, 1), (1, 1), (1, 2), 1)),
    "small groups": ((2, 4, 3, 3), (4, 2, 1, 1), ((1, 1), (0, 0), (1, 1), 2)),
}
CASES |= SMALL


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_derivatives(device, flags):
    for case in SMALL:
        function, inputs = differentiable(case, flags, device, want_stats=case == "small groups")
        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mapped,stats", [(True, True), (True, False), (False, False)])
def test_maps_that_are_handed_on(device, mapped, stats, dtype):
    """Of a dense block: the gradient of what reads them next, some channels of a wider one, joins in bit for bit."""
    tensors, _, geometry = make("primes", small, dtype, (mapped, mapped, False, False), device)
    x, weight, bias, scale, shift, _ = tensors
    later = small(x.shape[0], x.shape[1] + 3, *x.shape[2:], dtype=dtype, seed=9).to(device)
    later = later.contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    found = []
    for of_maps in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, scale, shift) if t is not None]
        arguments = (*leaves, *[None] * (5 - len(leaves)), mapped)
        if of_maps:
            y, *vectors, maps = conv2d_fused_of_maps(*arguments, stats, *geometry)
            assert maps.data_ptr() == x.data_ptr()
        else:
            y, *vectors = F.conv2d_fused(*arguments, None, False, stats, *geometry)
            maps = leaves[0]
        dy = small(*y.shape, dtype=dtype, seed=10).to(device)
        outputs, grads = [y, maps * 1], [dy, later]
        if of_maps:
            outputs[1] = maps
        if stats:
            outputs, grads = [*outputs, vectors[0]], [*grads, torch.zeros_like(vectors[0])]
        found.append([y.detach(), *torch.autograd.grad(outputs, leaves, grads)])
    for actual, expected in zip(*found, strict=True):
        assert_bitwise(actual, expected)


def test_derivatives_of_maps_that_are_handed_on(device):
    shapes = (2, 4, 3, 4), (4, 2, 2, 2), (4,), (4,), (4,)
    leaves = [reals(*s, dtype=torch.float64, seed=i).to(device) for i, s in enumerate(shapes)]
    leaves = [t.requires_grad_() for t in leaves]

    def function(*leaves):
        return conv2d_fused_of_maps(*leaves, True, True, (1, 1), (1, 0), (1, 1), 2)

    assert gradcheck(function, leaves, fast_mode=True) and gradgradcheck(function, leaves, fast_mode=True)
    maps = function(*leaves)[3]  # alone
    assert torch.equal(torch.autograd.grad(maps.sum(), leaves[0])[0], torch.ones_like(maps))
    with torch.no_grad():
        assert function(*leaves)[3] is leaves[0]


def test_statistics_alone_reach_the_parameters():
    tensors, relus, geometry = make("primes", reals, torch.float64, (True, True, False, False))
    weight = tensors[1].requires_grad_()
    _, mean, var = call(F.conv2d_fused, tensors, relus, geometry, want_stats=True)
    (found,) = torch.autograd.grad((mean.sum() + var.sum()), weight)
    _, mean, var = call(reference.conv2d_fused, tensors, relus, geometry)
    (expected,) = torch.autograd.grad((mean.sum() + var.sum()), weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 1), (3, 37, 5, 1), (7, 96, 9, 11), (0, 4, 2, 2)])
@pytest.mark.parametrize("residual,relu", list(itertools.product([False, True], repeat=2)))
def test_channel_map(device, shape, residual, relu):
    dtype = torch.float64
    x, added, dz = (small(*shape, dtype=dtype, seed=i).to(device) for i in range(3))
    scale, shift = (small(shape[1], dtype=dtype, seed=i).to(device) for i in (3, 4))

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, scale, shift, added)]
        z = function(*leaves[:3], leaves[3] if residual else None, relu)
        return z, *torch.autograd.grad(z, leaves[: 3 + residual], dz.to(dtype))

    def plain(x, scale, shift, added, relu):
        z = x * scale[:, None, None] + shift[:, None, None]
        z = z if added is None else z + added
        return z.relu() if relu else z

    for i, (actual, expected) in enumerate(
        zip(run(F.channel_map, torch.float32), run(plain, torch.float64), strict=True)
    ):
        assert_bitwise(actual, expected.float(), what=f"result {i}")


@pytest.mark.parametrize("relu", [False, True])
def test_channel_map_derivatives(device, relu):
    x, added = (reals(2, 3, 2, 4, dtype=torch.float64, seed=i).to(device).requires_grad_() for i in (0, 1))
    scale, shift = (reals(3, dtype=torch.float64, seed=i).to(device).requires_grad_() for i in (2, 3))
    for inputs in ((x, scale, shift), (x, scale, shift, added)):

        def function(x, scale, shift, added=None):
            return F.channel_map(x, scale, shift, added, relu)

        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 2), (3, 70, 29, 31)])
def test_channel_statistics(device, shape):
    x = reals(*shape, dtype=torch.float64) + 100
    mean, var = F.channel_statistics(x.float().to(device))
    expected = x.float().double()
    assert_accurate(mean, expected.mean((0, 2, 3)), ulps=8)
    assert_accurate(var, expected.var((0, 2, 3), correction=0), ulps=60)
    if x.numel() < 1000:
        assert gradcheck(F.channel_statistics, [x.to(device).requires_grad_()], fast_mode=True)
        assert gradgradcheck(F.channel_statistics, [x.to(device).requires_grad_()], fast_mode=True)


def test_bits_do_not_depend_on_the_threads():
    tensors, *rest = make("winograd", reals, torch.float32, (True, True, True, True))
    tensors[0], tensors[5] = tensors[0].repeat(40, 1, 1, 1), tensors[5].repeat(40, 1, 1, 1)
    dy = reals(*tensors[5].shape, dtype=torch.float32, seed=9)
    vector = reals(33, dtype=torch.float32, seed=10)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, found = with_gradients(
                F.conv2d_fused, tensors, *rest, [dy, vector, vector], want_stats=True
            )
            results.append([*outputs, *found.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_bitwise(value, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packed_weights_give_the_same_bits(case, dtype):
    """On every instruction set; what another one has packed is passed over."""
    tensors, (in_relu, out_relu), geometry = make(case, reals, dtype, (True, True, True, True))
    x, weight, bias, scale, shift, added = tensors
    ops, before, packed = torch.ops.cuda_cnn, _C.cpu_isa(), []
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            packed.append(ops.conv2d_pack(weight, geometry[-1]))
            options = (in_relu, added, out_relu, False, *geometry)
            expected = F.conv2d_fused(x, weight, bias, scale, shift, *options)[0]
            for other in packed:
                arguments = (x, weight, other, bias, scale, shift, in_relu, added, out_relu)
                assert_bitwise(ops.conv2d_packed(*arguments, *geometry), expected)
                wide = torch.full((len(x), weight.shape[0] + 3, *expected.shape[2:]), 7.0, dtype=dtype)
                wide = wide.contiguous(memory_format=torch.channels_last)
                ops.conv2d_packed_(wide[:, 2:-1], *arguments, *geometry)
                assert_bitwise(wide[:, 2:-1].contiguous(), expected.contiguous())
                assert (wide[:, :2] == 7).all() and (wide[:, -1] == 7).all()
            if weight.numel():
                pairs = packed[-1].dtype == torch.int32
                values = packed[-1].view(dtype) if pairs else packed[-1].to(dtype)
                assert values.count_nonzero() == weight.count_nonzero()
    finally:
        _C.set_cpu_isa(before)


def test_bad_packed_weights():
    ops, weight = torch.ops.cuda_cnn, torch.randn(4, 3, 3, 3)
    rest = (None, None, None, False, None, False, [1, 1], [0, 0], [1, 1], 1)
    packed = ops.conv2d_pack(weight, 1)
    with pytest.raises(
        RuntimeError, match="conv2d_packed: expected conv2d_pack's result for a weight of shape"
    ):
        ops.conv2d_packed(torch.randn(2, 3, 5, 5), weight, packed[:, 1:], *rest)
    with pytest.raises(
        RuntimeError, match="conv2d_packed: expected conv2d_pack's result for a weight of shape"
    ):
        ops.conv2d_packed(torch.randn(2, 3, 5, 5), weight, packed.double(), *rest)
    x, wide = torch.randn(2, 3, 5, 5), torch.zeros(2, 6, 3, 3)
    for out, message in (
        (wide[:, :4], "expected out to be channels of a channels_last tensor, got strides"),
        (wide.contiguous(memory_format=torch.channels_last)[:, :3], r"expected out of shape \[2, 4, 3, 3\]"),
        (wide[:, :4].double(), "expected out"),
        (wide[0], "expected out of 4 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.conv2d_packed_(out, x, weight, packed, *rest)
    with pytest.raises(RuntimeError, match="conv2d_packed: expected packed of 3 dimensions"):
        ops.conv2d_packed(torch.randn(2, 3, 5, 5), weight, packed[0], *rest)
    with pytest.raises(
        RuntimeError, match="conv2d_pack: expected weight of a multiple of 3 output channels, got 4"
    ):
        ops.conv2d_pack(weight, 3)


def test_bad_input():
    x, weight, vector = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"conv2d_fused: expected in_scale of shape \[3\], got \[4\]"):
        F.conv2d_fused(x, weight, None, torch.ones(4), vector)
    with pytest.raises(
        RuntimeError, match="expected in_scale and in_shift, or neither of them, got only in_scale"
    ):
        F.conv2d_fused(x, weight, None, vector)
    with pytest.raises(
        RuntimeError, match="expected in_shift of dtype Float beside input of Float, got Double"
    ):
        F.conv2d_fused(x, weight, None, vector, vector.double())
    with pytest.raises(RuntimeError, match=r"expected residual of shape \[2, 4, 3, 3\], got \[2, 4, 5, 5\]"):
        F.conv2d_fused(x, weight, residual=torch.randn(2, 4, 5, 5))
    with pytest.raises(RuntimeError, match="conv2d_fused: expected input of 3 channels"):
        F.conv2d_fused(x[:, :2], weight)
    with pytest.raises(RuntimeError, match=r"channel_map: expected scale of shape \[3\], got \[2\]"):
        F.channel_map(x, vector[:2], vector)


def test_operators_are_well_registered():
    for flags in FLAGS[:2]:
        (x, weight, bias, scale, shift, added), (in_relu, out_relu), geometry = make(
            "small", reals, torch.float32, flags
        )
        x.requires_grad_(), weight.requires_grad_()
        geometry = [list(g) if isinstance(g, tuple) else g for g in geometry]
        arguments = (x, weight, bias, scale, shift, in_relu, added, out_relu, True, *geometry)
        torch.library.opcheck(torch.ops.cuda_cnn.conv2d_fused.default, arguments)
    torch.library.opcheck(torch.ops.cuda_cnn.channel_map.default, (x, scale, shift, None, True))
    torch.library.opcheck(torch.ops.cuda_cnn.channel_statistics.default, (x,))


def test_autocast_and_transforms():
    tensors, relus, geometry = make("primes", reals, torch.float32, (True, True, False, True))
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = call(F.conv2d_fused, tensors, relus, geometry, want_stats=True)
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32

    def loss(weight):
        y, mean, var = call(
            F.conv2d_fused, [tensors[0], weight, *tensors[2:]], relus, geometry, want_stats=True
        )
        return y.square().mean() + (mean * var).sum()

    weight = tensors[1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(torch.func.grad(loss)(tensors[1]), expected, rtol=1e-4, atol=1e-5)


def plain_norm(x, weight, scale, shift, in_relu, gamma, beta, eps, residual, relu, stride):
    y, mean, var = reference.conv2d_fused(
        x, weight, None, scale, shift, in_relu, None, False, (stride, stride)
    )
    z = reference.batch_norm(y, None, None, gamma, beta, True, eps)
    z = z if residual is None else z + residual
    return z.relu() if relu else z, mean, var


@pytest.mark.parametrize("mapped,residual,relu,stride", [(1, 1, 1, 1), (0, 0, 0, 2), (1, 0, 1, 2)])
def test_conv2d_norm(device, mapped, residual, relu, stride):
    """Nothing of the map between is kept, yet gradients are those of the plain composition."""
    x = reals(2, 3, 3, 4, dtype=torch.float64)
    weight, gamma, beta = (
        reals(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(5, 3, 1, 1), (5,), (5,)])
    )
    scale, shift = (reals(3, dtype=torch.float64, seed=i) if mapped else None for i in (4, 5))
    gamma[2] = 0  # as zero-initialised residual blocks have it
    added = reals(2, 5, -(-3 // stride), 4 // stride, dtype=torch.float64, seed=6) if residual else None
    given = [x, weight, scale, shift, gamma, beta, added]
    present = [i for i, t in enumerate(given) if t is not None]
    inputs = [given[i].to(device).requires_grad_() for i in present]

    def run(function):
        def call(*tensors):
            full = [None] * 7
            for i, t in zip(present, tensors, strict=True):
                full[i] = t
            x, w, s, t, g, b, r = full
            return function(x, w, s, t, bool(mapped), g, b, 1e-3, r, bool(relu), stride)[0]

        return call

    dz = reals(2, 5, -(-3 // stride), 4 // stride, dtype=torch.float64, seed=7).to(device)
    z = run(conv2d_norm)(*inputs)
    expected = run(plain_norm)(*inputs)
    torch.testing.assert_close(z, expected)
    pairs = zip(torch.autograd.grad(z, inputs, dz), torch.autograd.grad(expected, inputs, dz), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right)
    if stride != 1:
        return
    assert gradcheck(run(conv2d_norm), inputs, fast_mode=True)
    with torch.no_grad():
        torch.testing.assert_close(run(conv2d_norm)(*inputs), expected)
    (twice,) = torch.autograd.grad(
        torch.autograd.grad(run(conv2d_norm)(*inputs), inputs[0], dz, create_graph=True)[0].square().sum(),
        inputs[1],
    )
    (right,) = torch.autograd.grad(
        torch.autograd.grad(run(plain_norm)(*inputs), inputs[0], dz, create_graph=True)[0].square().sum(),
        inputs[1],
    )
    torch.testing.assert_close(twice, right)


def test_conv2d_norm_keeps_only_its_input_and_its_result():
    kept = []

    def pack(t):
        kept.append(t)
        return t

    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 8, 1, 1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z, *_ = conv2d_norm(x, weight, relu=True)
    maps = {t.data_ptr() for t in kept if t.dim() == 4 and t.numel() > weight.numel()}
    assert maps == {x.data_ptr(), z.data_ptr()}
