"""convert and revert: only the class of a layer changes, both ways, whatever the layer is part of."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_cnn


class Block(nn.Module):
    """Every layer that is converted, some that are not, and one that has two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.lrn = nn.LocalResponseNorm(3)
        self.again = self.shared = nn.Conv2d(8, 8, (3, 1), padding="same", groups=2, padding_mode="reflect")
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.sync = nn.SyncBatchNorm(8, momentum=None)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.again(self.shared(self.lrn(self.stem(x))))
        return self.head(self.sync(self.pool(x)).mean((2, 3)))


TWINS = ("Conv2d", "BatchNorm2d", "SyncBatchNorm", "MaxPool2d", "LocalResponseNorm")


def classes(model):
    return [type(m) for m in model.modules()]


def batch(seed=0, size=9):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def step(model, x):
    """The output, the gradients and the running statistics of one training step."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


class Namespaces(TorchDispatchMode):
    """Which operators are called: the names that begin with `cuda_cnn::`."""

    def __init__(self):
        super().__init__()
        self.ours = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cuda_cnn":
            self.ours.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def ours_called(model, *args):
    with Namespaces() as seen, torch.no_grad():
        model(*args)
    return seen.ours


def test_only_the_class_of_a_layer_changes():
    torch.manual_seed(0)
    model = Block().train()
    model.pool.eval()
    before, objects = classes(model), list(model.modules())
    state = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
    attributes = [dict(vars(m)) for m in model.modules()]
    report = cuda_cnn.convert(model)
    assert list(model.modules()) == objects
    for old, new in zip(before, classes(model), strict=True):
        name = old.__name__
        assert new is (
            getattr(cuda_cnn.nn, name) if old.__module__.startswith("torch") and name in TWINS else old
        )
    assert [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()] == parameters
    assert list(model.state_dict()) == state and [dict(vars(m)) for m in model.modules()] == attributes
    assert len(report.changed) == 6 and report.left == []
    shared = next(c for c in report.changed if len(c.names) > 1)
    assert shared.names == ("again", "shared") and shared.operator == "conv2d"
    assert "6 layers changed" in str(report) and "torch.nn.Conv2d -> cuda_cnn.nn.Conv2d" in str(report)
    cuda_cnn.revert(model)
    assert classes(model) == before and [dict(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers(training):
    torch.manual_seed(0)
    model = Block().double().train(training)
    twin = copy.deepcopy(model)
    cuda_cnn.convert(twin)
    assert ours_called(twin, batch().double()) == {
        "conv2d",
        "batch_norm",
        "max_pool2d",
        "local_response_norm",
    }
    twin.load_state_dict(model.state_dict())
    for ours, torchs in zip(step(twin, batch().double()), step(model, batch().double()), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-11, atol=1e-12)
    twin.load_state_dict(model.state_dict())
    cuda_cnn.revert(twin)
    assert ours_called(twin, batch().double()) == set()
    twin.load_state_dict(model.state_dict())
    for a, b in zip(step(twin, batch().double()), step(model, batch().double()), strict=True):
        assert torch.equal(a, b)


def test_the_network_itself_may_be_a_layer():
    layer = nn.Conv2d(3, 4, 3)
    assert cuda_cnn.convert(layer).changed[0].names == ("",)
    assert type(layer) is cuda_cnn.nn.Conv2d and "(the network itself)" not in str(cuda_cnn.convert(layer))
    cuda_cnn.revert(layer)
    assert type(layer) is nn.Conv2d


def test_hooks_and_optimiser_stay():
    model, calls = Block(), []
    model.shared.register_forward_hook(lambda *_: calls.append("forward"))
    model.shared.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.shared.weight.register_hook(lambda g: calls.append("weight"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    cuda_cnn.convert(model)
    before = model.shared.weight.detach().clone()
    step(model, batch())
    optimiser.step()
    assert calls.count("forward") == calls.count("backward") == 2 and "weight" in calls
    assert not torch.equal(before, model.shared.weight)
    model.shared.reset_parameters()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_converted_and_can_be_reverted(how):
    model = Block().eval()
    before, expected = classes(model), model(batch())
    cuda_cnn.convert(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert classes(twin) == classes(model)
    cuda_cnn.revert(twin)
    assert classes(twin) == before and torch.equal(twin(batch()), expected)
    assert type(model.shared) is cuda_cnn.nn.Conv2d


def test_state_dict_goes_both_ways():
    model, plain = Block(), Block()
    cuda_cnn.convert(model)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.eval()(batch()), plain.eval()(batch()))


def test_twice_and_never():
    model = Block()
    assert cuda_cnn.revert(model).changed == [] and classes(model) == classes(Block())
    cuda_cnn.convert(model)
    once = classes(model)
    again = cuda_cnn.convert(model)
    assert again.changed == again.left == [] and classes(model) == once


def test_two_networks_that_share_a_layer():
    layer = nn.Conv2d(3, 3, 1)
    one, two = nn.Sequential(layer, nn.ReLU()), nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    cuda_cnn.convert(one)
    assert type(two[1]) is cuda_cnn.nn.Conv2d and type(two[0]) is nn.Conv2d
    assert [c.names for c in cuda_cnn.convert(two).changed] == [("0",)]
    cuda_cnn.revert(one)
    assert type(two[1]) is nn.Conv2d and type(two[0]) is cuda_cnn.nn.Conv2d


def test_ops_and_filter():
    model = Block()
    report = cuda_cnn.convert(model, ops=["conv2d", "max_pool2d"], filter_fn=lambda m, name: name != "again")
    assert {c.operator for c in report.changed} == {"conv2d", "max_pool2d"}
    reasons = {left.names: left.reason for left in report.left}
    assert reasons["again", "shared"] == "filter_fn refused again"
    assert reasons["sync",] == "batch_norm is not in ops" and all(left.asked for left in report.left)
    cuda_cnn.convert(model, ops="conv2d", strict=True)  # what ops leaves out is no failure
    assert type(model.shared) is cuda_cnn.nn.Conv2d
    with pytest.raises(ValueError, match=r"expected ops .* got .*conv3d"):
        cuda_cnn.convert(model, ops="conv3d")
    with pytest.raises(TypeError, match=r"convert: expected model to be a torch.nn.Module, got Tensor"):
        cuda_cnn.convert(torch.ones(3))


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def parametrized():
    layer = nn.Conv2d(3, 3, 1)
    torch.nn.utils.parametrizations.weight_norm(layer)
    return layer


def replaced_forward():
    layer = nn.MaxPool2d(2)
    layer.forward = lambda x: x
    return layer


def qconfig():
    layer = nn.Conv2d(3, 3, 1)
    layer.qconfig = torch.ao.quantization.get_default_qconfig()
    return layer


LEFT = {
    "a subclass of torch.nn.Conv2d": lambda: OwnConv(3, 3, 1),
    "parametrized": parametrized,
    "quantised: it has a qconfig": qconfig,
    "quantised": lambda: torch.ao.nn.quantized.Conv2d(3, 3, 1),
    "lazy": lambda: nn.LazyConv2d(3, 1),
    "its forward is replaced": replaced_forward,
    "weight is of dtype torch.complex64": lambda: nn.Conv2d(3, 3, 1, dtype=torch.complex64),
    "there is no kernel": lambda: nn.ConvTranspose2d(3, 3, 1),
    "scripted": lambda: torch.jit.script(nn.MaxPool2d(2)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("reason", LEFT)
def test_left_with_the_reason(reason):
    layer = LEFT[reason]()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    before = type(layer)
    with pytest.raises(ValueError, match=f"strict, and 1 layers cannot be changed:[^Z]*{reason}"):
        cuda_cnn.convert(model, strict=True)
    assert type(model[0]) is nn.Conv2d
    report = cuda_cnn.convert(model)
    assert type(model[0]) is cuda_cnn.nn.Conv2d and type(model[1]) is before
    (left,) = report.left
    assert (
        left.names == ("1",) and left.reason.startswith(reason) and f"left: 1 ({left.layer})" in str(report)
    )
    cuda_cnn.revert(model)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is before


def test_not_listed_what_nobody_expects():
    assert (
        cuda_cnn.convert(nn.Sequential(nn.ReLU(), nn.Linear(3, 3), nn.AvgPool2d(2), nn.LayerNorm(3))).left
        == []
    )


def test_a_lazy_layer_is_converted_after_its_first_batch():
    model = nn.Sequential(nn.LazyConv2d(3, 1))
    model(batch())
    assert len(cuda_cnn.convert(model, strict=True).changed) == 1


def test_pruned_and_weight_normed_by_hooks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
    expected = model(batch())
    cuda_cnn.convert(model)
    assert ours_called(model, batch()) == {"conv2d"}
    torch.testing.assert_close(model(batch()), expected)


def test_parametrized_after_conversion():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    cuda_cnn.convert(model)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert ours_called(model, batch()) == {"conv2d"}
    assert "parametrized" in cuda_cnn.revert(model).left[0].reason
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert len(cuda_cnn.revert(model).changed) == 1 and type(model[0]) is nn.Conv2d


ZOO = {
    "lenet5": (1, 32),
    "lenet5_modern": (1, 32),
    "alexnet_cifar": (3, 32),
    "resnet20": (3, 32),
    "densenet40_12": (3, 32),
    "googlenet": (3, 64),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_networks_revert_to_plain_torch(name):
    channels, size = ZOO[name]
    torch.manual_seed(0)
    options = {"depth": 10} if name == "densenet40_12" else {}
    model = cuda_cnn.create_model(name, **options).double().eval()
    x = torch.rand(2, channels, size, size, dtype=torch.float64)
    before = classes(model)
    assert ours_called(model, x)
    expected = model(x)
    cuda_cnn.revert(model)
    assert ours_called(model, x) == set()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    cuda_cnn.convert(model, strict=True)
    assert classes(model) == before


@pytest.mark.parametrize("name", ["alexnet", "vgg11_lrn", "vgg16c_bn", "plain20", "googlenet_torchvision"])
def test_nothing_of_a_zoo_network_is_left(name):
    with torch.device("meta"):
        model = cuda_cnn.create_model(name)
    assert cuda_cnn.revert(model).left == []
    kinds = {type(m) for m in model.modules()}
    assert not any(k.__module__ == "cuda_cnn.nn" and not k.__name__.startswith("Torch") for k in kinds)
