"""batch_norm as PyTorch sees it: transforms, compilation, autocast, the module, errors."""

import pytest
import torch
from helpers import assert_accurate, assert_bitwise, lay_out, reals
from test_batch_norm import EPS, arguments

from cuda_cnn import functional as F
from cuda_cnn import nn


def test_transforms():
    xs, _, weight, bias, mean, var, _ = arguments((20, 5, 3, 2), torch.float64)
    xs = xs.unflatten(0, (4, 5))

    def loss(parameters, x):
        return F.batch_norm(x, None, None, *parameters, True, relu=True).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))((weight, bias), xs)
    one_by_one = [torch.func.grad(loss)((weight, bias), x) for x in xs]
    for ours, expected in zip(per_sample, zip(*one_by_one, strict=True), strict=True):
        assert_bitwise(ours, torch.stack(expected))

    def evaluate(x, weight):
        return F.batch_norm(x, mean, var, weight, bias)

    mapped = torch.func.vmap(evaluate, in_dims=(2, 1))(xs.movedim(0, 2), torch.stack([weight] * 4, 1))
    assert_bitwise(mapped, torch.stack([evaluate(x, weight) for x in xs]))
    with pytest.raises(RuntimeError):  # no forward-mode formula: an error, never silent zeros
        torch.func.jvp(lambda t: evaluate(t, weight), (xs[0],), (xs[0],))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_opcheck(layout, training, relu):
    x, residual, weight, bias, mean, var, dy = arguments((2, 6, 3, 4), torch.float32)
    x, residual, dy = (lay_out(t, layout).requires_grad_() for t in (x, residual, dy))
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    running = (None, None) if training else (mean, var)
    forward, backward = torch.ops.cuda_cnn.batch_norm.default, torch.ops.cuda_cnn.batch_norm_backward.default
    torch.library.opcheck(forward, (x, residual, weight, bias, *running, training, EPS, relu))
    torch.library.opcheck(forward, (x, None, None, None, *running, training, EPS, relu))
    rest = (mean, var, training, EPS, relu)
    torch.library.opcheck(backward, (dy, x, None, weight, bias, *rest, [True, True, False]))
    torch.library.opcheck(
        backward, (dy, x, residual if relu else None, weight, None, *rest, [True, True, relu])
    )


def test_the_returned_statistics_have_derivatives():
    x, _, weight, bias, *_ = arguments((3, 2, 2, 2), torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def statistics(x, weight, bias):
        return torch.ops.cuda_cnn.batch_norm(x, None, weight, bias, None, None, True, EPS, False)

    torch.autograd.gradcheck(statistics, inputs)
    torch.autograd.gradgradcheck(statistics, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_and_export(layout):
    eager, compiled = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = lay_out(reals(3, 6, 4, 5, dtype=torch.float32), layout).requires_grad_()
    for training in (True, False):
        eager.train(training), compiled.train(training)
        y, expected = step(x, relu=True), eager(x, relu=True)
        assert_bitwise(y, expected)
        assert y.stride() == expected.stride()
        inputs = [[x, *m.parameters()] for m in (compiled, eager)]
        for a, b in zip(
            torch.autograd.grad(y.sin().sum(), inputs[0]),
            torch.autograd.grad(expected.sin().sum(), inputs[1]),
        ):
            assert_bitwise(a, b)
        assert_bitwise(compiled.running_mean, eager.running_mean)
        assert_bitwise(compiled.running_var, eager.running_var)
    assert_bitwise(torch.export.export(eager, (x.detach(),)).module()(x), eager(x))


def test_autocast_changes_nothing():
    x, _, weight, bias, mean, var, _ = arguments((2, 6, 3, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.batch_norm(x, mean, var, weight, bias).dtype == torch.float32
        assert F.batch_norm(x.bfloat16(), mean, var, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_module_is_torchs(momentum, affine, track):
    options = {
        "eps": EPS,
        "momentum": momentum,
        "affine": affine,
        "track_running_stats": track,
        "dtype": torch.float64,
    }
    ours, torchs = nn.BatchNorm2d(5, **options), torch.nn.BatchNorm2d(5, **options)
    torchs.load_state_dict(ours.state_dict())
    for step, training in enumerate([True, True, False, True]):
        ours.train(training), torchs.train(training)
        x = reals(3, 5, 4, 2, dtype=torch.float64, seed=step)
        assert_accurate(ours(x), torchs(x), ulps=16)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert_accurate(value.double(), torchs.state_dict()[key].double(), ulps=8, what=key)
    residual = reals(3, 5, 4, 2, dtype=torch.float64)
    ours.eval(), torchs.eval()
    assert_accurate(ours(x, residual, relu=True), torch.relu(torchs(x) + residual), ulps=16)


def test_a_forward_pass_between_forward_and_backward():
    """Training saves nothing that a later step changes in place: torch's raises here."""
    x, mean, var = reals(2, 3, 4, 4, dtype=torch.float32).requires_grad_(), torch.zeros(3), torch.ones(3)
    first, second = (F.batch_norm(x, mean, var, training=True) for _ in range(2))
    (first.square().sum() + second.sum()).backward()


V = torch.ones(3)
X = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda f: f(torch.ones(3), None, None, training=True), IndexError, "2 or more dimensions, got 1"),
        (
            lambda f: f(torch.ones(1, 3), V, V, training=True),
            ValueError,
            "more than 1 value per channel when training",
        ),
        (
            lambda f: f(X[:1, :, :1, :1], V, V, training=True),
            ValueError,
            "more than 1 value per channel when training",
        ),
        (lambda f: f(X, V, V, eps=-1.0), ValueError, "eps must be non-negative, got -1"),
        (lambda f: f(X, V, V, training=True, eps=0.0), ValueError, "eps must be positive during training"),
        (lambda f: f(X, None, None), RuntimeError, "running_mean must be defined"),
        (lambda f: f(X, V, None), RuntimeError, "running_var must be defined"),
        (lambda f: f(X, V, None, training=True), ValueError, "both be None or neither"),
        (lambda f: f(X, V[:2], V), RuntimeError, "running_mean of 3 elements, one for each channel, got 2"),
        (
            lambda f: f(X, V, V[:2], training=True),
            RuntimeError,
            "running_var of 3 elements, one for each channel, got 2",
        ),
        (lambda f: f(X, V, V, V[:2]), RuntimeError, "weight of 3 elements, one for each channel, got 2"),
        (lambda f: f(X, V, V, V, V[:1]), RuntimeError, "bias of 3 elements, one for each channel, got 1"),
        (lambda f: f(X.double(), V, V), RuntimeError, "running_mean of dtype Double like input, got Float"),
        (lambda f: f(X, V, V, V.double()), RuntimeError, "weight of dtype Float like input, got Double"),
        (lambda f: f(X.int(), V, V), NotImplementedError, "input of dtype float32.*got Int"),
        (lambda f: f(X.cfloat(), V, V), NotImplementedError, "input of dtype float32.*got ComplexFloat"),
        (lambda f: f(X.to_sparse(), V, V), NotImplementedError, "input to be a dense"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(F.batch_norm)
    with pytest.raises(error):  # the same type as torch's
        call(torch.nn.functional.batch_norm)


@pytest.mark.parametrize(
    "residual,text",
    [
        (X[:1], "residual of shape .2, 3, 4, 4., got .1, 3, 4, 4."),
        (X.double(), "residual of dtype Float like input, got Double"),
        (X.to_sparse(), "residual to be a dense"),
    ],
)
def test_bad_residual(residual, text):
    with pytest.raises(RuntimeError, match=text):
        F.batch_norm(X, V, V, residual=residual)
