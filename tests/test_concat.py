import itertools
from functools import partial

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_bitwise, integers, lay_out, reals
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

from cuda_cnn import _C, nn, reference
from cuda_cnn import functional as F

OP_INFO = next(op for op in op_db if op.name == "cat")

# shapes, dim
CASES = [
    ([(2, 3, 5, 4), (2, 7, 5, 4)], 1),
    ([(2, 64, 9, 7), (2, 32, 9, 7), (2, 1, 9, 7)], 1),
    ([(2, 3, 5, 4), (1, 3, 5, 4), (4, 3, 5, 4)], 0),
    ([(2, 3, 5, 4), (2, 3, 1, 4)], 2),
    ([(2, 3, 5, 4), (2, 3, 5, 9)], -1),
    ([(1, 3, 200, 171), (1, 5, 200, 171)], 1),  # rows of several pieces
    ([(2, 3, 5, 4)], 1),
    ([(1, 1, 1, 1), (1, 1, 1, 1)], 1),
    ([(2, 0, 5, 4), (2, 3, 5, 4)], 1),
    ([(0, 3, 5, 4), (0, 2, 5, 4)], 1),
    ([(0,), (2, 3, 5, 4), (0,), (2, 1, 5, 4)], 1),
    ([(0,), (0,)], 0),
    ([(4,), (9,)], 0),
    ([(2, 3, 4, 5, 6), (2, 2, 4, 5, 6)], 1),
]
ANY_DTYPES = [
    *DTYPES,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def make(shapes, dtype, layouts, device="cpu"):
    return [
        lay_out(integers(*shape, dtype=dtype, seed=seed).to(device), layout)
        for seed, (shape, layout) in enumerate(zip(shapes, itertools.cycle(layouts), strict=False))
    ]


def assert_as_torch(tensors, dim):
    """Values, gradients and strides."""
    what = f"{[tuple(t.shape) for t in tensors]}, dim {dim}"
    if tensors[0].is_floating_point():
        tensors = [t.detach().requires_grad_() for t in tensors]
    y, expected = F.concat(tensors, dim), torch.cat(tensors, dim)
    assert_bitwise(y, expected, what)
    assert y.stride() == expected.stride(), what
    if tensors[0].is_floating_point():
        dy = torch.randn_like(expected)
        for a, e in zip(*(torch.autograd.grad(t, tensors, dy) for t in (y, expected)), strict=True):
            assert_bitwise(a, e, f"gradient of {what}")


@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
def test_matches_torch(device, dtype, layout):
    layouts = ["channels_last", "contiguous", "transposed"] if layout == "mixed" else [layout]
    if layout in ("sliced", "offset") and dtype not in DTYPES:
        return  # their gaps are NaN
    for shapes, dim in CASES:
        if layout in ("sliced", "transposed", "mixed") and any(len(shape) < 2 for shape in shapes):
            continue
        assert_as_torch(make(shapes, dtype, layouts, device), dim)


def test_matches_reference(device):
    tensors = make([(2, 3, 5, 4), (2, 7, 5, 4)], torch.float32, ["channels_last"], device)
    assert_bitwise(F.concat(tensors, 1), reference.concat(tensors, 1))


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_each_instruction_set(isa):
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        for (shapes, dim), layout in itertools.product(CASES, ["contiguous", "channels_last"]):
            assert_as_torch(make(shapes, torch.float32, [layout]), dim)
    finally:
        _C.set_cpu_isa(before)


def test_slices_are_read_where_they_lie():
    """DenseNet's case: channels of a wider channels_last buffer, not dense themselves."""
    buffer = lay_out(reals(2, 24, 6, 5, dtype=torch.float32), "channels_last")
    parts = [buffer[:, 16:], buffer[:, 3:7], buffer[:, :1].expand(2, 9, 6, 5), buffer[:, 7:9, :, :]]
    assert_as_torch(parts, 1)
    assert_as_torch([buffer[:, :, 1:4], buffer[:, :, :2]], 2)
    assert_as_torch([buffer[:1].expand(3, -1, -1, -1), buffer], 0)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float16), (torch.int32, torch.float16)]
)
def test_promotes(dtypes):
    tensors = [integers(2, 3, 4, 4, dtype=dtype) for dtype in dtypes]
    y = F.concat(tensors, 1)
    assert_bitwise(y, torch.cat(tensors, 1))
    wants = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    for a, e in zip(
        *(torch.autograd.grad(f(tensors, 1).sum(), wants) for f in (F.concat, torch.cat)), strict=True
    ):
        assert_bitwise(a, e)


@pytest.mark.parametrize("inputs", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_autocast_promotes_as_torch_does(inputs):
    tensors = [reals(2, 3, 4, 4, dtype=dtype) for dtype in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise(F.concat(tensors, 1), torch.cat(tensors, 1))


def test_conjugate_and_negative_views():
    x = torch.randn(2, 3, dtype=torch.complex64)
    assert torch.equal(F.concat([x.conj(), x], 1), torch.cat([x.conj(), x], 1))
    assert torch.equal(F.concat([x.conj().imag, x.real], 1), torch.cat([x.conj().imag, x.real], 1))


def test_results_do_not_depend_on_threads():
    tensors = make([(3, 64, 31, 29), (3, 32, 31, 29)], torch.float32, ["channels_last"])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_as_torch(tensors, 1)
    finally:
        torch.set_num_threads(before)


def test_gradients_are_views():
    x, z = (torch.zeros(2, c, 4, 4, requires_grad=True) for c in (3, 5))
    dy = torch.randn(2, 8, 4, 4)
    dx, dz = torch.autograd.grad(F.concat([x, z], 1), [x, z], dy)
    assert dx.data_ptr() == dy.data_ptr() and dz.data_ptr() == dy[:, 3:].data_ptr()


def test_derivatives(device):
    a, b = (reals(2, c, 3, 2, dtype=torch.float64, seed=c).to(device).requires_grad_() for c in (3, 2))

    def function(*tensors):
        return F.concat(tensors, 1)

    assert gradcheck(function, (a, b))
    assert gradgradcheck(lambda *t: function(*t).square(), (a, b))
    assert gradcheck(lambda t: F.concat([t, t.sin(), t], -1), a)  # x reaches the result three times


def test_transforms():
    x, shared = reals(5, 3, 4, 2, dtype=torch.float64), reals(2, 4, 2, dtype=torch.float64, seed=1)

    def loss(t, u, cat):
        return cat([t, u, t], 0).square().sum()

    for in_dims, args in (((0, None), (x, shared)), ((0, 1), (x, torch.stack([shared] * 5, 1)))):
        ours, torchs = (
            torch.func.vmap(torch.func.grad(partial(loss, cat=cat), argnums=(0, 1)), in_dims)(*args)
            for cat in (F.concat, torch.cat)
        )
        for a, e in zip(ours, torchs, strict=True):
            assert_bitwise(a, e)
    for dim in (0, -1):
        ours = torch.func.vmap(lambda t, dim=dim: F.concat([t, t, t.new_zeros(0)], dim))(x)
        assert_bitwise(ours, torch.cat([x, x], dim + 1 if dim >= 0 else dim))
    with pytest.raises(RuntimeError):  # no forward-mode formula: an error, never silent zeros
        torch.func.jvp(lambda t: F.concat([t, t]), (x,), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    tensors = [t.requires_grad_() for t in make([(2, 3, 5, 4), (2, 6, 5, 4)], torch.float32, [layout])]
    for dim in (1, -1):
        torch.library.opcheck(torch.ops.cuda_cnn.concat.default, (tensors[: 2 if dim == 1 else 1], dim))
    buffer = lay_out(torch.zeros(2, 10, 5, 4), layout)
    torch.library.opcheck(torch.ops.cuda_cnn.write_channels_.default, (buffer, tensors[0].detach(), 2))
    new = torch.ops.cuda_cnn.channel_buffer.default  # its memory has no values that could be compared
    torch.library.opcheck(new, (tensors[0].detach(), 9), test_utils=("test_schema", "test_faketensor"))


def test_compile_and_export():
    layer = nn.Concat(dim=1)
    tensors = [
        t.requires_grad_() for t in make([(2, 3, 5, 4), (2, 6, 5, 4)], torch.float32, ["channels_last"])
    ]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(tensors), layer(tensors))
    assert compiled(tensors).stride() == layer(tensors).stride()
    for a, e in zip(
        *(torch.autograd.grad(f(tensors).square().sum(), tensors) for f in (compiled, layer)), strict=True
    ):
        assert_bitwise(a, e)
    assert_bitwise(torch.export.export(layer, (tensors,)).module()(tensors), layer(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_write_channels(device, dtype, layout):
    buffer = lay_out(torch.full((2, 9, 5, 4), 7, dtype=dtype, device=device), layout)
    for x_layout, start, channels in [
        ("channels_last", 2, 3),
        ("contiguous", 0, 2),
        ("sliced", 6, 3),
        ("offset", 5, 1),
    ]:
        x = lay_out(integers(2, channels, 5, 4, dtype=dtype).to(device), x_layout)
        expected = buffer.clone()
        expected[:, start : start + channels] = x
        assert F.write_channels_(buffer, x, start) is buffer
        assert_bitwise(buffer, expected, f"{x_layout} to {start}")


def test_write_channels_counts_as_a_change():
    buffer, x = torch.zeros(2, 4, 3, 3), torch.ones(2, 1, 3, 3)
    y = (torch.ones(2, 4, 3, 3, requires_grad=True) * buffer).sum()
    F.write_channels_(buffer, x, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    compiled = torch.compile(lambda b, t: F.write_channels_(b, t, 2), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(buffer, x)
    assert buffer[:, [0, 2]].eq(1).all() and buffer[:, [1, 3]].eq(0).all()


@given(
    data=st.data(),
    rank=st.integers(1, 5),
    count=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    dtype=st.sampled_from(ANY_DTYPES),
)
def test_any_shape(data, rank, count, layout, dtype):
    dim = data.draw(st.integers(-rank, rank - 1))
    common = [data.draw(st.integers(0, 9)) for _ in range(rank)]
    shapes = []
    for _ in range(count):
        shape = list(common)
        shape[dim] = data.draw(st.integers(0, 40))
        shapes.append(tuple(shape))
    assert_as_torch(make(shapes, dtype, [layout]), dim)


@pytest.mark.parametrize("dtype", sorted(OP_INFO.supported_dtypes("cpu"), key=str), ids=str)
def test_opinfo_samples(dtype):
    if dtype == torch.complex32:
        pytest.skip("torch cannot make its samples on a CPU: no random numbers of complex32")
    for sample in OP_INFO.sample_inputs("cpu", dtype):
        assert_bitwise(*(f(sample.input, *sample.args, **sample.kwargs) for f in (F.concat, torch.cat)))


def test_opinfo_errors():
    for error in OP_INFO.error_inputs("cpu"):
        sample = error.sample_input
        # Up to torch 2.11 its argument parser speaks for torch.cat(tensor).
        text = error.error_regex.replace("invalid combination of arguments", "must be tuple of Tensors")
        with pytest.raises(error.error_type, match=text):
            F.concat(sample.input, *sample.args, **sample.kwargs)


X = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: F.concat([]), ValueError, "non-empty list"),
        (lambda: F.concat(X), TypeError, "tuple of Tensors"),
        (lambda: F.concat([X, 3]), TypeError, "element 1 .* got int"),
        (lambda: F.concat([X, X], 4), IndexError, "out of range"),
        (lambda: F.concat([X, X], -5), IndexError, "out of range"),
        (lambda: F.concat([torch.ones(())]), RuntimeError, "zero-dimensional"),
        (lambda: F.concat([X, X[0]]), RuntimeError, "same number of dimensions: got 4 and 3"),
        (
            lambda: F.concat([X, X[..., :2]], 1),
            RuntimeError,
            "Expected size 4 but got size 2 for tensor number 1",
        ),
        (lambda: F.concat([X.to_sparse(), X.to_sparse()]), RuntimeError, "dense"),
        (lambda: F.write_channels_(X.clone(), X[:, :, :2], 0), RuntimeError, "but for its channels"),
        (
            lambda: F.write_channels_(X.clone(), X, 1),
            RuntimeError,
            "channels 1 to 4 do not lie in a buffer of 3",
        ),
        (lambda: F.write_channels_(X.clone(), X[:, :1], -1), RuntimeError, "channels -1 to 0"),
        (lambda: F.write_channels_(X.clone(), X.double(), 0), RuntimeError, "dtype"),
        (lambda: F.write_channels_(torch.ones(2, 6, 4, 4)[:, ::2], X, 0), RuntimeError, "dense buffer"),
        (
            lambda: F.write_channels_(X.clone(), X.clone().requires_grad_(), 0),
            RuntimeError,
            "outside autograd",
        ),
        (lambda: nn.Concat(7)([X, X]), IndexError, "out of range"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
