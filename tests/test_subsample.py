import pytest
import torch
from helpers import DTYPES, LAYOUTS, ROUNDOFF, assert_accurate, assert_bitwise, integers, lay_out, reals
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cuda_cnn import _C, nn, reference
from cuda_cnn import functional as F

SQUASHES = ["tanh", "sigmoid", "none"]
# shape, kernel_size
CASES = [
    ((2, 6, 28, 28), 2),  # LeNet-5's S2
    ((3, 16, 10, 10), 2),  # and S4
    ((2, 37, 7, 9), 2),  # a row and a column left over
    ((1, 5, 13, 11), (3, 4)),
    ((2, 3, 4, 5), 1),
    ((1, 1, 1, 1), 1),
    ((1, 2, 90, 77), 2),  # several bands
    ((7, 8, 6), 2),  # unbatched
    ((0, 3, 6, 6), 2),
]


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def arguments(shape, dtype, seed=0, make=reals):
    channels = shape[-3]
    return [make(*s, dtype=dtype, seed=seed + i) for i, s in enumerate([shape, (channels,), (channels,)])]


def composite(x, coefficient, bias, kernel_size, squash):
    """The same in torch's own operators."""
    total = torch.nn.functional.avg_pool2d(x, kernel_size, divisor_override=1)
    a = coefficient[:, None, None] * total + bias[:, None, None]
    return {"tanh": lambda: 1.7159 * torch.tanh(2 / 3 * a), "sigmoid": a.sigmoid, "none": lambda: a}[squash]()


def with_gradients(function, tensors, dy, *parameters):
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors, *parameters)
    return y, *torch.autograd.grad(y, tensors, dy)


def error_bounds(tensors, dy, kernel_size, dtype, ulps=8):
    """For y and the three gradients: `ulps` roundoffs of all that is summed, had nothing cancelled.

    An error in a = coefficient · Σ window + bias, or in y as it is stored, enters the slope, whose own slope is at
    most 4/3·y and below 3.
    """
    absolute = [t.abs() for t in tensors]
    in_a = reference.subsample(*absolute, kernel_size, "none")
    bounds = with_gradients(reference.subsample, absolute, dy.abs() * (3 + 3 * in_a), kernel_size, "none")
    return [ulps * ROUNDOFF[dtype] * (t + (t == 0)) for t in (2 + bounds[0], *bounds[1:])]


def assert_as_reference(shape, kernel_size, squash, dtype, layout, device="cpu", seed=0):
    tensors = arguments(shape, dtype, seed)
    exact = [t.double() for t in tensors]
    dy = reals(*reference.subsample(*exact, kernel_size, squash).shape, dtype=dtype, seed=seed + 9)
    expected = with_gradients(reference.subsample, exact, dy.double(), kernel_size, squash)
    bounds = error_bounds(exact, dy.double(), kernel_size, dtype)
    x, *channels = (t.to(device) for t in tensors)
    tensors = [lay_out(x, layout), *channels]
    ours = with_gradients(F.subsample, tensors, lay_out(dy.to(device), layout), kernel_size, squash)
    for name, a, e, bound in zip(("y", "dx", "dcoefficient", "dbias"), ours, expected, bounds, strict=True):
        what = f"{name} of {shape}, {kernel_size}, {squash}, {layout}"
        assert a.dtype == dtype and a.shape == e.shape, what
        excess = (a.cpu().double() - e).abs() / bound
        assert excess.numel() == 0 or excess.max() <= 1, (
            f"{what}: {excess.max():.2f} × bound at {excess.argmax()}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("squash", SQUASHES)
def test_matches_reference(device, dtype, layout, squash):
    for seed, (shape, kernel_size) in enumerate(CASES):
        assert_as_reference(shape, kernel_size, squash, dtype, layout, device, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set(isa, dtype):
    for seed, (shape, kernel_size) in enumerate(CASES):
        for layout in ("contiguous", "channels_last"):
            assert_as_reference(shape, kernel_size, "tanh", dtype, layout, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_exact(device, dtype, layout):
    for shape, kernel_size in CASES[1:]:
        tensors = [
            integers(*t.shape, dtype=dtype, low=-2, high=3, seed=i)
            for i, t in enumerate(arguments(shape, dtype))
        ]
        if shape == (1, 2, 90, 77):
            tensors[0] *= 0  # its channel sums are too long for 16 bits
        dy = integers(
            *composite(*[t.double() for t in tensors], kernel_size, "none").shape, dtype=dtype, low=-1, high=2
        )
        exact = with_gradients(composite, [t.double() for t in tensors], dy.double(), kernel_size, "none")
        x, *channels = (t.to(device) for t in tensors)
        ours = with_gradients(
            F.subsample, [lay_out(x, layout), *channels], dy.to(device), kernel_size, "none"
        )
        for name, a, e in zip(("y", "dx", "dcoefficient", "dbias"), ours, exact, strict=True):
            assert_bitwise(a, e.to(dtype), f"{name} of {shape}, {layout}")


@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
def test_squashing_function_everywhere(isa, squash):
    """From the smallest numbers to saturation, in units of the last place of the exact value."""
    a = torch.cat([torch.logspace(-38, 3, 4001), torch.linspace(0, 20, 4001), torch.tensor([float("inf")])])
    a = torch.cat([a, -a])[None, None]
    one, zero = torch.ones(1), torch.zeros(1)
    y = F.subsample(a, one, zero, 1, squash)
    exact = composite(a.double(), one.double(), zero.double(), 1, squash)
    unit = torch.maximum(exact.abs() * 2**-23, torch.tensor(2.0**-126))
    assert ((y.double() - exact).abs() / unit).max() <= 4
    assert F.subsample(torch.full((1, 1, 2, 2), float("nan")), one, zero, 2, squash).isnan().all()


def test_strides_are_torchs(device):
    for (shape, kernel_size), layout in ((c, x) for c in CASES for x in ("contiguous", "channels_last")):
        x, coefficient, bias = (t.to(device) for t in arguments(shape, torch.float32))
        x = lay_out(x, layout).requires_grad_()
        y = F.subsample(x, coefficient, bias, kernel_size)
        pooled = torch.nn.functional.avg_pool2d(x, kernel_size)
        assert y.stride() == pooled.stride()
        assert torch.autograd.grad(y.sum(), x)[0].stride() == torch.autograd.grad(pooled.sum(), x)[0].stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_threads(layout):
    x, *channels = arguments((9, 16, 37, 40), torch.float32)
    dy = reals(9, 16, 18, 20, dtype=torch.float32, seed=9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(F.subsample, [lay_out(x, layout), *channels], dy, 2, "tanh"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_bitwise(a, e)


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives(device, squash, layout):
    # A row left over; several windows of a plane, and a column left over.
    for shape, kernel_size in [((2, 2, 3, 2), 2), ((2, 2, 3), (1, 2))]:
        x, *channels = (t.to(device) for t in arguments(shape, torch.float64))
        tensors = [t.requires_grad_() for t in (lay_out(x, layout), *channels)]

        def function(*t, kernel_size=kernel_size):
            return F.subsample(*t, kernel_size, squash)

        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors)

    def gradient(*t):
        return torch.autograd.grad(function(*t).square().sum(), t, create_graph=True)

    assert gradgradcheck(gradient, tensors)


def test_transforms():
    for shape in [(4, 3, 6, 5), (4, 2, 3, 6, 5)]:
        x, coefficient, bias = (reals(*s, dtype=torch.float64) for s in (shape, (4, 3), (3,)))

        def loss(x, coefficient, bias, function=F.subsample):
            return function(x, coefficient, bias, 2, "tanh").square().sum()

        for in_dims, arguments_ in (
            ((0, None, None), (x, coefficient[0], bias)),
            ((0, 0, None), (x, coefficient, bias)),
        ):
            ours, torchs = (
                torch.func.vmap(
                    torch.func.grad(lambda *t, f=f: loss(*t, function=f), argnums=(0, 1, 2)), in_dims
                )(*arguments_)
                for f in (F.subsample, composite)
            )
            for a, e in zip(ours, torchs, strict=True):
                assert_accurate(a, e, ulps=64)
    with pytest.raises(RuntimeError):  # no forward-mode formula: an error, never silent zeros
        torch.func.jvp(lambda t: F.subsample(t, coefficient[0], bias), (x[0],), (x[0],))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x, coefficient, bias = (t.requires_grad_() for t in arguments((2, 3, 5, 4), torch.float32))
    x = lay_out(x.detach(), layout).requires_grad_()
    y = F.subsample(x, coefficient, bias).detach().requires_grad_()
    dy = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(torch.ops.cuda_cnn.subsample.default, (x, coefficient, bias, [2, 2], "tanh"))
    torch.library.opcheck(
        torch.ops.cuda_cnn.subsample_backward.default, (dy, x, coefficient, y, [2, 2], "tanh")
    )


def test_compile_and_export():
    layer = nn.Subsample2d(6)
    x = reals(2, 6, 8, 9, dtype=torch.float32).requires_grad_()
    wants = [x, *layer.parameters()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x), layer(x))
    for a, e in zip(*(torch.autograd.grad(f(x).sum(), wants) for f in (compiled, layer)), strict=True):
        assert_bitwise(a, e)
    assert_bitwise(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_autocast_promotes_as_torch_does():
    x, coefficient, bias = arguments((2, 3, 4, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in (x, x.bfloat16()):
            ours, torchs = F.subsample(t, coefficient, bias), composite(t, coefficient, bias, 2, "tanh")
            assert ours.dtype == torchs.dtype == torch.float32


def test_layer():
    torch.manual_seed(0)
    layer = nn.Subsample2d(6, squash="sigmoid")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "coefficient": (6,),
        "bias": (6,),
    }
    assert all(p.abs().max() <= 0.6 and p.std() > 0 for p in layer.parameters())
    x = reals(2, 6, 8, 9, dtype=torch.float32)
    assert_accurate(layer(x), composite(x.double(), *(p.double() for p in layer.parameters()), 2, "sigmoid"))


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 20, 20))),
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    squash=st.sampled_from(SQUASHES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(shape, kernel_size, squash, layout):
    if shape[2] < kernel_size[0] or shape[3] < kernel_size[1]:
        with pytest.raises(RuntimeError, match="too small"):
            F.subsample(*arguments(shape, torch.float32), kernel_size, squash)
        return
    assert_as_reference(shape, kernel_size, squash, torch.float32, layout)


X, C = torch.ones(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: F.subsample(torch.ones(4, 4), C, C), RuntimeError, "3 or 4 dimensions, got 2"),
        (lambda: F.subsample(X, torch.ones(4), C), RuntimeError, r"coefficient of shape \[3\], got \[4\]"),
        (lambda: F.subsample(X, C, torch.ones(3, 1)), RuntimeError, r"bias of shape \[3\], got \[3, 1\]"),
        (lambda: F.subsample(X, C, C, 0), RuntimeError, "kernel_size > 0, got 0"),
        (lambda: F.subsample(X, C, C, (2, -1)), RuntimeError, "kernel_size > 0, got -1"),
        (lambda: F.subsample(X, C, C, (2, 2, 2)), RuntimeError, "tuple of two ints"),
        (lambda: F.subsample(X, C, C, 5), RuntimeError, "too small"),
        (lambda: F.subsample(X, C, C, squash="relu"), ValueError, 'got "relu"'),
        (lambda: F.subsample(X.int(), C.int(), C.int()), RuntimeError, "of dtype float32.*got Int"),
        (lambda: F.subsample(X.to_sparse(), C, C), RuntimeError, "dense"),
        (lambda: nn.Subsample2d(5)(X), RuntimeError, "coefficient of shape"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
