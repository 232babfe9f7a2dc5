"""What happens to a fused network between its calls: copies, new weights and layers, hooks, `unfuse`."""

import copy
import gc
import io
import pickle

import pytest
import torch
from test_fuse import assert_same, build, images
from torch import nn

import cuda_cnn
from cuda_cnn.fuse import layers


def test_parameters_state_and_class_stay_and_unfuse_leaves_no_trace():
    model = build("dense")
    before = copy.deepcopy(model.__dict__)
    parameters, keys, kind = list(model.parameters()), list(model.state_dict()), type(model)
    cuda_cnn.fuse(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys and type(model) is kind
    model(images())
    assert cuda_cnn.unfuse(model) is model
    assert list(model.__dict__) == list(before)
    assert cuda_cnn.unfuse(model) is model


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_networks_of_their_own(how):
    model = build("bottlenecks").eval()
    cuda_cnn.fuse(model)
    expected = model(images())
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.forward.module is other
    with torch.no_grad():
        next(model.parameters()).zero_()
    torch.testing.assert_close(other(images()), expected)
    assert not torch.allclose(model(images()), expected)
    assert "forward" not in cuda_cnn.unfuse(other).__dict__


def test_weights_written_between_calls_are_seen():
    model, x = build("bottlenecks").eval(), images()
    cuda_cnn.fuse(model)
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert torch.allclose(model(x), cuda_cnn.unfuse(copy.deepcopy(model))(x))
        other = build("bottlenecks", seed=5).state_dict()
        model.load_state_dict(other)
        assert torch.allclose(model(x), cuda_cnn.unfuse(copy.deepcopy(model))(x))
        model(x)
        model[0].weight.data.mul_(0.5)
        model.train().eval()
        model.train()
        model.eval()


def test_flops_of_packed_convolutions_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = build("bottlenecks").eval(), images()
    counts = []
    for prepare in (lambda m: m, cuda_cnn.fuse):
        prepare(model)
        with torch.no_grad():
            model(x)
            with FlopCounterMode(display=False) as counter:
                model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_values_kept_for_inference_are_never_those_of_memory_used_again():
    """Both writes leave the version counters at what they were, and may leave the address."""
    model, x = build("bottlenecks").eval(), images()
    cuda_cnn.fuse(model)
    with torch.no_grad():
        for _ in range(5):
            model(x)
            model.half().double()
            assert torch.allclose(model(x), cuda_cnn.unfuse(copy.deepcopy(model))(x))
            shape = model[0].weight.shape
            del model[0].weight
            model[0].weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
            assert torch.allclose(model(x), cuda_cnn.unfuse(copy.deepcopy(model))(x))


def test_settings_written_between_calls_are_seen():
    model, x = build("bottlenecks").eval(), images()
    cuda_cnn.fuse(model)
    with torch.no_grad():
        for write in (
            lambda: setattr(model[1], "eps", 0.5),
            lambda: setattr(model[0], "padding", (2, 2)),
            lambda: setattr(model[0], "padding", "valid"),
            lambda: setattr(model[1], "weight", None),
        ):
            model(x)
            write()
            torch.testing.assert_close(model(x), cuda_cnn.unfuse(copy.deepcopy(model))(x))


@pytest.mark.parametrize("name", ["bottlenecks", "dense"])
def test_kept_layers_take_one_step(name, monkeypatch):
    """In inference from the second call on, until a derivative or another precision is wanted."""
    model, x = build(name, dtype=torch.float32).eval(), images(torch.float32)
    cuda_cnn.fuse(model)
    with torch.no_grad():
        expected = model(x)
        at_length = []
        weights = layers._weights
        monkeypatch.setattr(layers, "_weights", lambda *a: at_length.append(a) or weights(*a))
        assert torch.equal(model(x), expected) and torch.equal(model(x.contiguous()), expected)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
        assert not at_length
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model(x), expected)
        assert at_length
    at_length.clear()
    x.requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, expected)
    assert y.requires_grad and at_length


def test_what_is_kept_ends_with_its_layer():
    gc.collect()  # other tests' layers
    before = set(layers._kept)
    model = build("bottlenecks").eval()
    cuda_cnn.fuse(model)
    with torch.no_grad():
        model(images())
    assert len(layers._kept) > len(before)
    del model
    gc.collect()
    assert set(layers._kept) <= before


def test_layers_may_be_replaced_after_fusing():
    model, x = build("bottlenecks"), images()
    cuda_cnn.fuse(model)
    model(x)
    model[0] = nn.Conv2d(3, 8, 3, 2, 1).double()
    model[7] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2)).double()
    assert_same(cuda_cnn.unfuse(copy.deepcopy(model)), model, x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_with_hooks_are_left_alone(when):
    model, x, seen = build("bottlenecks").eval(), images(), []

    def add_hooks():
        model[4].bn2.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model[5].register_forward_hook(lambda module, inputs, output: seen.append(output))
        model.register_forward_hook(lambda module, inputs, output: seen.append(output))

    if when == "before":
        add_hooks()
    cuda_cnn.fuse(model)
    if when == "after":
        add_hooks()
    found = model(x)
    outputs, seen[:] = list(seen), []
    expected = cuda_cnn.unfuse(model)(x)
    torch.testing.assert_close(found, expected)
    assert len(outputs) == len(seen) == 3
    for output, right in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, right)
    rows = {row.layer: row.what for row in cuda_cnn.fuse(model).left}
    assert rows["4.bn2"] == rows["5"] == "it has hooks"
