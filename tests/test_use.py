"""use, enable, disable: unmodified code on these kernels, counted, and undone."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.data import DataLoader, Dataset

import cuda_cnn
from cuda_cnn import _aten

KEYS = [(o.name, key) for o in _aten.OVERRIDES for key in o.keys if "CUDA" not in key]


def dispatcher():
    """What stands in PyTorch's dispatcher for the operators that are overridden."""
    return [torch._C._dispatch_dump_table(f"aten::{name}") for name, _ in KEYS]


@pytest.fixture(autouse=True)
def nothing_stays():
    before, functional = dispatcher(), F.local_response_norm
    yield
    assert dispatcher() == before and F.local_response_norm is functional


class Unmodified(nn.Module):
    """A network of somebody who has never heard of cuda_cnn."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.weight = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        x = torch.cat([x, F.conv2d(F.local_response_norm(input=x, size=3), self.weight)], 1)
        return self.head(x.mean((2, 3)))


def step(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers_and_every_call_is_ours(training, layout):
    torch.manual_seed(0)
    model = Unmodified().double().train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64).to(memory_format=layout)
    expected = step(model, x)
    with cuda_cnn.use() as log:
        results = step(twin, x)
    for ours, torchs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-11, atol=1e-12)
    called = {call.name: n for call, n in log.counts.items()}
    assert log.fallbacks == 0 and log.ours == sum(log.counts.values())
    assert {call.operator for call in log.counts} == {
        "conv2d",
        "max_pool2d",
        "batch_norm",
        "concat",
        "local_response_norm",
    }
    backwards = {"convolution_backward", "max_pool2d_with_indices_backward", "native_batch_norm_backward"}
    assert backwards <= set(called), called
    assert all(type(b) is type(a) for a, b in zip(model.modules(), twin.modules()))


NAMES = ["nn.functional.conv2d", "nn.functional.max_pool2d", "nn.functional.batch_norm", "cat"]


@pytest.mark.parametrize("name", NAMES)
def test_pytorchs_own_samples(name):
    """Values and gradients beside PyTorch's, for a spread of op_db's samples; errors are PyTorch's own."""
    info = next(op for op in op_db if op.name == name and not op.variant_test_name)
    samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=True))
    samples = samples[:: max(1, len(samples) // 60)]
    served = 0
    for sample in samples:
        tensors = [sample.input, *sample.args, *sample.kwargs.values()]
        flat = [t for a in tensors for t in (a if isinstance(a, (list, tuple)) else [a])]
        leaves = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]

        def run(sample=sample, leaves=leaves):
            y = info.op(sample.input, *sample.args, **sample.kwargs)
            y = y if isinstance(y, tuple) else (y,)
            grads = torch.autograd.grad(y[0].sin().sum(), leaves, allow_unused=True)
            return y, grads

        expected = run()
        with cuda_cnn.use() as log:
            result = run()
        served += log.ours
        torch.testing.assert_close(
            result, expected, rtol=1e-10, atol=1e-11, msg=lambda m, s=sample: f"{s}: {m}"
        )
        assert [t.stride() for t in result[0] if t.numel()] == [t.stride() for t in expected[0] if t.numel()]
    assert served >= len(samples)
    for error in info.error_inputs("cpu") if info.error_inputs_func else ():
        sample = error.sample_input
        with cuda_cnn.use(), pytest.raises(error.error_type, match=error.error_regex):
            info.op(sample.input, *sample.args, **sample.kwargs)


def test_double_backward():
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 5, 5), (6, 2, 3, 3)))
    with cuda_cnn.use() as log:
        assert torch.autograd.gradgradcheck(lambda x, w: F.conv2d(x, w, stride=2, groups=2), (x, w))
        assert torch.autograd.gradgradcheck(lambda x: F.max_pool2d(x, 2, 1), (x,))
        assert torch.autograd.gradgradcheck(lambda x: F.batch_norm(x, None, None, training=True), (x,))
    assert log.ours > 0


@pytest.mark.parametrize(
    "window",
    [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 2), ((17, 16), 3, (8, 8), 1), ((2, 3), (3, 1), 0, (2, 1))],
)
def test_pool_gradient_finds_its_cells(window):
    """Equal values, NaN and −∞: from torch's indices to our taps."""
    x = torch.randint(0, 3, (2, 3, 20, 19)).double()
    x[0, 0, 3:9, 3:9], x[0, 1, :12, :12] = float("nan"), -float("inf")
    x.requires_grad_()

    def run():
        y, indices = F.max_pool2d(x, *window, ceil_mode=True, return_indices=True)
        return indices, torch.autograd.grad(y, x, torch.arange(float(y.numel()), dtype=y.dtype).view_as(y))[0]

    expected = run()
    with cuda_cnn.use() as log:
        result = run()
    assert log.ours == 2 and all(map(torch.equal, result, expected))


def test_running_statistics_between_forward_and_backward():
    """torch lets a layer run twice before the first backward pass, though its statistics have changed."""
    norm = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with cuda_cnn.use():
        (norm(x) + norm(x)).square().sum().backward()
    assert norm.num_batches_tracked == 2 and x.grad.isfinite().all()


def test_what_falls_through():
    with cuda_cnn.use(fallback=False) as log:
        F.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 2))
        F.conv3d(torch.ones(1, 2, 5, 5, 5), torch.ones(3, 2, 2, 2, 2))
        F.conv_transpose2d(torch.ones(1, 2, 5, 5), torch.ones(2, 3, 2, 2))
    assert log.ours == 0
    assert sorted(call.reason for call in log.counts) == [
        "1-D convolution",
        "2-D transposed",
        "3-D convolution",
    ]


def test_fallback_and_its_reason():
    x, w = torch.ones(1, 2, 5, 5, dtype=torch.int64), torch.ones(3, 2, 2, 2, dtype=torch.int64)
    with cuda_cnn.use() as log:
        y = F.conv2d(x, w)
        torch.cat([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    assert torch.equal(y, torch.full((1, 3, 4, 4), 8)) and log.ours == 0
    integers = "conv2d: expected input of dtype float32, float64, bfloat16 or float16, got Long"
    reasons = {call.reason: (call.shapes, n) for call, n in log.counts.items()}
    assert reasons[integers] == (((1, 2, 5, 5), (3, 2, 2, 2)), 1) and "mixed dtypes" in reasons
    assert f"PyTorch: {integers}" in str(log) and "1×2×5×5 3×2×2×2" in str(log)
    with (
        cuda_cnn.use(fallback=False),
        pytest.raises(NotImplementedError, match="convolution: conv2d: expected input of dtype"),
    ):
        F.conv2d(x, w)


def test_a_convolution_of_no_channels_is_torchs():
    """PyTorch's test_conv_empty_channel: its result has no channels either."""
    layer, x = nn.Conv2d(3, 5, 3, stride=2), torch.randn(2, 0, 7, 9, requires_grad=True)
    layer.weight = nn.Parameter(torch.empty(5, 0, 3, 3))
    expected = layer(x)
    with cuda_cnn.use() as log:
        y = layer(x)
        y.sum().backward()
    assert y.shape == expected.shape == (2, 0, 3, 4) and log.ours == 0
    assert torch.equal(layer.bias.grad, torch.zeros(5)) and x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (2, 3, 1, 4), (3, 4, 2, 5), (1, 1, 4, 2), (2, 5, 1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (2, 1, 0, 3)])
def test_batch_norm_has_torchs_strides_for_every_layout(shape, order):
    """PyTorch's test_batchnorm_non_contig_cpu: an extent of 1 leaves a stride open, and the format with it."""
    x = torch.randn(shape).permute(order)
    for training in (True, False):
        found = []
        for form in ("torch", "used", "converted"):
            norm = nn.BatchNorm2d(x.shape[1]).train(training)
            if form == "converted":
                cuda_cnn.convert(norm)
            leaf = x.detach().requires_grad_()
            with cuda_cnn.use("batch_norm" if form == "used" else ()) as log:
                y = norm(leaf)
                (dx,) = torch.autograd.grad(y.square().sum(), leaf)
            assert log.ours == 2 * (form == "used") and log.fallbacks == 0
            found.append((y.detach(), dx, y.stride()))
        for values in found[1:]:
            torch.testing.assert_close(values[:2], found[0][:2], rtol=1e-4, atol=1e-4)
            assert values[2] == found[0][2]
        statistics = (None, None) if training else (norm.running_mean, norm.running_var)
        arguments = (x, None, norm.weight, norm.bias, *statistics, training, norm.eps, False)
        with torch.no_grad():
            torch.library.opcheck(
                torch.ops.cuda_cnn.batch_norm.default, arguments, test_utils="test_faketensor"
            )


def test_ops_and_exclude():
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 2, 2)
    with cuda_cnn.use(ops=["conv2d", "max_pool2d"], exclude="max_pool2d") as log:
        F.max_pool2d(F.conv2d(x, w), 2)
        torch.cat([x, x])
    assert {call.operator for call in log.counts} == {"conv2d"}
    for arguments in ({"ops": "conv3d"}, {"exclude": ["cat"]}):
        with pytest.raises(ValueError, match="use: expected operators among"):
            cuda_cnn.use(**arguments)


def conv(channels=2):
    return F.conv2d(torch.ones(1, channels, 4, 4), torch.ones(1, channels, 1, 1))


def test_blocks_nest_and_the_innermost_counts():
    with cuda_cnn.use() as outer:
        conv()
        with cuda_cnn.use(exclude="conv2d") as inner:
            conv()
            with cuda_cnn.use() as innermost:
                conv()
        conv()
    conv()
    assert (outer.ours, inner.ours, innermost.ours) == (2, 0, 1)


def test_an_exception_undoes_it():
    with cuda_cnn.use() as outer:
        with pytest.raises(KeyError), cuda_cnn.use():
            raise KeyError
        conv()
    conv()
    assert outer.ours == 1


def test_the_log_outlives_its_block():
    """torch 2.11 would take a reference away from it."""
    counts = []
    for _ in range(50):
        with cuda_cnn.use() as log:
            conv()
        counts.append(sys.getrefcount(log))
        assert log.ours == 1
    probe = object()
    assert counts == [sys.getrefcount(probe)] * 50


def test_as_a_decorator():
    assert cuda_cnn.use()(conv)().sum() == 32


def test_other_threads_are_not_affected():
    inside, done = threading.Event(), threading.Event()
    logs = []

    def user():
        with cuda_cnn.use() as log:
            logs.append(log)
            inside.set()
            assert done.wait(30)
            conv()

    thread = threading.Thread(target=user)
    thread.start()
    assert inside.wait(30)
    conv()
    done.set()
    thread.join()
    assert logs[0].ours == 1


def test_many_threads_come_and_go():
    failures = []

    def work(channels):
        for _ in range(20):
            with cuda_cnn.use() as log:
                y = conv(channels)
            if log.ours != 1 or y.sum() != 16 * channels:
                failures.append((log.ours, y))

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


def test_enable_holds_for_every_thread_until_disable():
    log = cuda_cnn.enable()
    try:
        conv()
        thread = threading.Thread(target=conv)
        thread.start()
        thread.join()
        with cuda_cnn.use() as inner:
            conv()
        assert (log.ours, inner.ours) == (2, 1)
        second = cuda_cnn.enable(exclude="conv2d")
        conv()
        assert second.ours == 0
    finally:
        cuda_cnn.disable()
    cuda_cnn.disable()
    conv()
    assert log.ours == 2


class Convolved(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return F.conv2d(torch.full((1, 1, 2, 2), float(i)), torch.ones(1, 1, 2, 2)).flatten()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_reset_undoes_what_holds_for_the_process():
    x, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    before = cuda_cnn.functional.conv2d(x, weight)
    log = cuda_cnn.enable()
    cuda_cnn.backends.conv2d_algorithm, cuda_cnn.backends.winograd = "reference", False
    F.conv2d(x, weight)
    assert not torch.equal(cuda_cnn.functional.conv2d(x, weight), before)
    served = log.ours
    cuda_cnn.reset()
    cuda_cnn.reset()
    F.conv2d(x, weight)
    assert log.ours == served > 0
    assert (cuda_cnn.backends.conv2d_algorithm, cuda_cnn.backends.winograd) == ("auto", True)
    assert torch.equal(cuda_cnn.functional.conv2d(x, weight), before)


def test_data_loader_workers():
    with cuda_cnn.use() as log:
        values = torch.cat(list(DataLoader(Convolved(), batch_size=2, num_workers=2)))
    assert values.flatten().tolist() == [0, 4, 8, 12]
    assert log.ours == 1  # the cat here; the workers' calls are counted in the workers


def test_autocast_inference_mode_and_functorch():
    x, model = torch.randn(2, 3, 8, 8), Unmodified()
    with cuda_cnn.use() as log, torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    dtypes = {call.dtype for call in log.counts if call.name == "convolution"}
    assert dtypes == {torch.bfloat16} and log.fallbacks == 0
    with torch.inference_mode():
        expected = model.eval()(x)
        with cuda_cnn.use() as log:
            torch.testing.assert_close(model(x), expected)
    assert log.ours > 0
    weights = torch.randn(3, 5, 3, 2, 2)
    each = torch.func.vmap(torch.func.grad(lambda w: F.conv2d(x, w).square().sum()))
    expected = each(weights)
    with cuda_cnn.use() as log:
        torch.testing.assert_close(each(weights), expected, rtol=1e-4, atol=1e-4)
    assert log.ours > 0


def test_cuda_batch_norm_is_led_past_cudnn():
    """The function that stands before cuDNN's operator gives aten's own result (here on a CPU)."""
    x, w = torch.randn(3, 4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    y = _aten.batch_norm_without_cudnn(x, w, None, None, None, True, 0.1, 1e-5, True)
    expected = torch.batch_norm(x, w, None, None, None, True, 0.1, 1e-5, False)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, w)) for t in (y, expected)), strict=True):
        assert torch.equal(a, b)
