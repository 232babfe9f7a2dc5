"""cuda_cnn.fuse: the same numbers, fewer maps, and no trace left by unfuse."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cuda_cnn
from cuda_cnn.models import densenet, googlenet, resnet, vgg


class ForeignBottleneck(nn.Module):
    """As torchvision writes it: in-place sums and ReLUs, one ReLU module for all."""

    def __init__(self, planes, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if planes != 4 * width or stride != 1:
            down = nn.Conv2d(planes, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class PreActivation(nn.Module):
    """Two convolutions, one of them grouped, on the same normalised map; a bias; a broadcast sum; a reused layer."""

    def __init__(self, planes=6):
        super().__init__()
        self.norm = nn.BatchNorm2d(planes, momentum=None)
        self.left = nn.Conv2d(planes, planes, 3, padding="same")
        self.right = nn.Conv2d(planes, planes, (3, 1), padding=(1, 0), groups=2)
        self.twice = nn.Conv2d(planes, planes, 1)
        self.offset = nn.Parameter(torch.randn(1, planes, 1, 1))

    def forward(self, x):
        a = self.norm(x).relu()
        out = self.left(a) + self.right(a)
        out = self.twice(self.twice(out).relu_()) + self.offset
        return torch.relu(out) + x.mean((2, 3), keepdim=True)


def head(planes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, 5))


NETWORKS = {
    "bottlenecks": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        ForeignBottleneck(8, 4), ForeignBottleneck(16, 4), ForeignBottleneck(16, 6, 2), head(24),
    ),
    "wide bottlenecks": lambda: nn.Sequential(ForeignBottleneck(3, 2, 2), ForeignBottleneck(8, 2), head(8)),
    "pre-activation": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), PreActivation(), head(6)),
    "basic blocks": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1], 5),
    "dense": lambda: densenet.DenseNet((3, 4), 4, 8, 5, 3),
    "dense without bottlenecks": lambda: densenet.DenseNet((3, 3), 4, 8, 5, 3, bn_size=0, cifar_stem=True),
    "inception": lambda: nn.Sequential(googlenet.Inception(3, (4, 3, 5, 2, 3, 4), True, 5), head(16)),
    "VGG": lambda: nn.Sequential(vgg._features([[8, 9], [7]], 3, True, False)[0], head(7)),
    "VGG with norm": lambda: nn.Sequential(vgg._features([[8, 9], [7]], 3, False, True)[0], head(7)),
    "norm without parameters": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), head(4),
    ),
}  # fmt: skip


def build(name, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(dtype)


def images(dtype=torch.float64, batch=3, side=20):
    return torch.randn(batch, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_same(plain, fused, x, **tolerance):
    """Outputs, gradients and buffers of one call."""
    x, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, w = plain(x), fused(z)
    torch.testing.assert_close(w, y, **tolerance)
    y.square().sum().backward()
    w.square().sum().backward()
    torch.testing.assert_close(z.grad, x.grad, **tolerance)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    for (name, p), q in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers_in_every_mode(name, layout, recompute):
    plain = build(name)
    fused = copy.deepcopy(plain).to(memory_format=layout)
    x = images().contiguous(memory_format=layout)
    report = cuda_cnn.fuse(fused, recompute=recompute)
    assert report.mode == "training" and report.fused and not report.left
    assert_same(plain, fused, x)
    assert_same(plain.eval(), fused.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(fused(x), plain(x))  # with what was kept from the first call
    assert cuda_cnn.fuse(fused, recompute=recompute).mode == "inference"
    assert_same(plain.train(), fused.train(), x)
    for module in (*plain.modules(), *fused.modules()):  # fine-tuning: statistics stay, the rest trains
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_same(plain, fused, x)


@pytest.mark.parametrize("rows", [1, 5, 16, 17])
def test_linear_layers(rows):
    """A few rows go through the convolution's kernels, which round otherwise; more do not."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 133), nn.ReLU(True), nn.Dropout(0.0),
        nn.Linear(133, 40, bias=False), nn.Tanh(), nn.Linear(40, 7),
    ).double()  # fmt: skip
    fused = copy.deepcopy(plain)
    what = {row.layer: row.what for row in cuda_cnn.fuse(fused).fused}
    assert what["3"] == "a few rows on a CPU: a 1×1 convolution, ReLU"
    assert what["6"] == what["8"] == "a few rows on a CPU: a 1×1 convolution"
    with torch.profiler.profile() as profile:
        assert_same(plain, fused, images(batch=rows, side=4))
    calls = [event.name for event in profile.events()]
    assert calls.count("cuda_cnn::conv2d_fused") == (4 if rows <= 16 else 1)
    assert_same(plain.eval(), fused.eval(), images(batch=rows, side=4))
    torch.autograd.gradgradcheck(lambda x: fused(x).tanh(), images(batch=2, side=4).requires_grad_())


def test_linear_layers_that_only_torch_has():
    class Quantised(torch.Tensor):
        pass

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    x = images(torch.float32, side=4)
    expected = plain(x)
    plain[2].weight = nn.Parameter(plain[2].weight.detach().as_subclass(Quantised), requires_grad=False)
    cuda_cnn.fuse(plain)
    with torch.profiler.profile() as profile:
        y = plain(x)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
    assert "aten::linear" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name,size", [("lenet5", 32), ("lenet5_modern", 32), ("alexnet_cifar", 32)])
def test_networks_without_normalisation(name, size):
    torch.manual_seed(0)
    plain = cuda_cnn.create_model(name).double()
    fused = copy.deepcopy(plain)
    cuda_cnn.fuse(fused)
    channels = next(m.in_channels for m in plain.modules() if isinstance(m, nn.Conv2d))
    x = torch.rand(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        assert_same(plain.train(training), fused.train(training), x)


@pytest.mark.parametrize("name", ["bottlenecks", "dense", "inception"])
def test_same_loss_curve(name):
    """20 steps of SGD in float32, against the unfused network in the same precision."""
    curves = []
    for fused in (False, True):
        model = build(name, dtype=torch.float32)
        if fused:
            cuda_cnn.fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        target, losses = torch.arange(8) % 5, []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(images(torch.float32, 8)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)


def test_no_layer_runs_twice():
    """Not even where something is written in place behind it."""
    body, _ = vgg._features([[8, 9], [7]], 3, False, True)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(7 * 5 * 5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    for model in (nn.Sequential(body, tail), build("bottlenecks", dtype=torch.float32)):
        for training in (True, False):
            report = cuda_cnn.fuse(model.train(training))
            layers = [row.layer for row in report.fused]
            assert len(layers) == len(set(layers))
            assert len(layers) == sum(
                isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear) for m in model.modules()
            )
            assert model(images(torch.float32)).shape[0] == 3


class Careless(nn.Module):
    """A normalisation whose result nobody reads; sums in place, of a value with other readers and of a view."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.other_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pair, self.unread = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.norm(self.left(x))
        out.add_(self.other_norm(self.right(x)))
        both = self.pair(out)
        self.unread(self.pair(out))
        half = both[:, :4]
        half += self.other_norm(self.right(x))
        return both.relu()


def test_layers_that_nobody_reads_and_sums_in_place():
    torch.manual_seed(0)
    plain = nn.Sequential(Careless(), head(8)).double()
    fused = copy.deepcopy(plain)
    for training in (True, False):
        plain.train(training), fused.train(training)
        cuda_cnn.fuse(fused)
        assert_same(plain, fused, images())
    assert fused[0].unread.num_batches_tracked == 1


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", ["bottlenecks", "dense"])
def test_second_derivatives(name, recompute):
    plain = build(name)
    fused = copy.deepcopy(plain)
    cuda_cnn.fuse(fused, recompute=recompute)

    def penalty(model):
        x = images(batch=2, side=12).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for found, expected in zip(penalty(fused), penalty(plain), strict=True):
        torch.testing.assert_close(found, expected)


# ---- The model stays what it was ----------------------------------------------------------------------------


def test_the_report_names_what_was_not_fused():
    class Odd(nn.Conv2d):
        pass

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ForeignBottleneck(4, 2)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    model = nn.Sequential(
        Odd(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.SyncBatchNorm(4), Branches()
    ).eval()
    report = cuda_cnn.fuse(model)
    rows = {row.layer: row.what for row in report.left}
    assert rows["0"] == "a Odd, not exactly a Conv2d"
    assert rows["1"] == "padding_mode 'reflect'"
    assert rows["3"].startswith("it cannot be traced (TraceError")
    assert "3.inner.conv3" in {row.layer for row in report.fused}  # its parts are
    assert str(report).startswith(
        f"inference: {len(report.fused)} layers fused, {len(report.left)} left alone"
    )
    torch.testing.assert_close(model(images(torch.float32)), cuda_cnn.unfuse(model)(images(torch.float32)))


def test_a_tracer_a_transform_and_a_compiler_see_the_model_itself():
    model, x = build("bottlenecks").eval(), images()
    expected = model(x)
    cuda_cnn.fuse(model)
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target == "4.bn1" for node in traced.graph.nodes)
    torch.testing.assert_close(
        torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected
    )
    torch.testing.assert_close(torch.vmap(lambda image: model(image[None])[0])(x), expected)


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
def test_autocast(recompute):
    model = build("bottlenecks", dtype=torch.float32)
    x = images(torch.float32)
    fused = copy.deepcopy(model)
    cuda_cnn.fuse(fused, recompute=recompute)
    for train in (True, False):
        model.train(train), fused.train(train)
        with torch.autocast("cpu", torch.bfloat16):
            y, z = model(x), fused(x)
        assert z.dtype == y.dtype
        torch.testing.assert_close(z, y, rtol=0.1, atol=0.1)


def test_one_value_a_channel_is_refused_in_training():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    cuda_cnn.fuse(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 1, 1))


# ---- Memory ------------------------------------------------------------------------------------------------


def kept_bytes(model, x):
    """Of the maps that a training step keeps for its backward pass: distinct storages, parameters apart."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    for tensor in (*model.parameters(), x):
        kept.pop(tensor.untyped_storage()._cdata, None)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_a_training_step_keeps_at_most_60_percent(name):
    """Of what the same network keeps on torch's own layers; counted on fake tensors, which compute nothing."""
    eager = []
    with FakeTensorMode():
        x = torch.randn(4, 3, 224, 224)
        for layout in (torch.contiguous_format, torch.channels_last):
            plain = cuda_cnn.create_model(name)
            cuda_cnn.revert(plain)
            eager.append(kept_bytes(plain, x.contiguous(memory_format=layout)))
        model = cuda_cnn.create_model(name)
        cuda_cnn.fuse(model)
        fused = kept_bytes(model, x)
        cuda_cnn.fuse(model, recompute=False)
        kept = kept_bytes(model, x)
    assert fused > 2**20
    assert fused <= 0.6 * min(eager) and fused < kept <= min(eager)


def test_a_network_that_keeps_its_maps_can_recompute_them_later():
    model = build("bottlenecks")
    kept = {row.layer: row.what for row in cuda_cnn.fuse(model, recompute=False).fused}
    again = {row.layer: row.what for row in cuda_cnn.fuse(copy.deepcopy(model), recompute=False).fused}
    recomputed = {row.layer: row.what for row in cuda_cnn.fuse(model).fused}
    assert kept == again and kept["4.bn1"] == "one pass with what follows, kept"
    assert recomputed["4.bn1"] == "on the load of the next convolution"
