"""DenseNet: blocks, their derivatives and memory."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import SMALL_DENSENET, assert_near, on_meta, on_torch_layers, reals
from torch import Tensor, nn

from cuda_cnn import create_model
from cuda_cnn.models.densenet import DenseBlock, DenseNet

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_block(**options) -> DenseBlock:
    torch.manual_seed(0)
    options = {"bn_size": 2, "drop_rate": 0.0, "memory_efficient": False} | options
    return DenseBlock(3, 4, 2, **options).double()


def joined(block: DenseBlock, x: Tensor) -> Tensor:
    """The block by its definition: every layer reads the concatenation of all before it."""
    for layer in block.values():
        out = layer.conv1(F.relu(layer.norm1(x)))
        if layer.bottleneck:
            out = layer.conv2(F.relu(layer.norm2(out)))
        x = torch.cat([x, out], 1)
    return x


@pytest.mark.parametrize("bn_size", [0, 2])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dense_block_is_its_definition(bn_size, memory_efficient, layout):
    block = dense_block(bn_size=bn_size, memory_efficient=memory_efficient)
    twin = on_torch_layers(block)
    a = reals(2, 4, 5, 3).contiguous(memory_format=layout).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = block(a), joined(twin, b)
    assert_near(y, expected, 1e-12, "output")
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert_near(a.grad, b.grad, 1e-10, "input gradient")
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert_near(p.grad, q.grad, 1e-9, name)
    for (name, p), q in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert_near(p, q, 1e-12, name)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_dense_block_derivatives(memory_efficient):
    block = dense_block(memory_efficient=memory_efficient)
    x = reals(2, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(block, (x,), fast_mode=True)


def test_dense_block_serves_two_inputs_before_one_backward():
    block = dense_block().eval()
    a, b = (reals(2, 4, 3, 3, seed=s).requires_grad_() for s in (0, 1))
    (block(a).sum() * block(b).sum()).backward()
    c, d = (t.detach().clone().requires_grad_() for t in (a, b))
    (joined(block, c).sum() * joined(block, d).sum()).backward()
    assert_near(a.grad, c.grad, 1e-12, "first")
    assert_near(b.grad, d.grad, 1e-12, "second")


def test_dense_block_under_transforms():
    block = dense_block().eval()
    x = reals(2, 4, 3, 3)
    expected = joined(block, x)
    exported = torch.export.export(block, (x,)).module()
    assert_near(exported(x), expected, 1e-12, "torch.export")
    gradient = torch.func.grad(lambda t: block(t).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    joined(block, leaf).pow(2).sum().backward()
    assert_near(gradient, leaf.grad, 1e-12, "torch.func.grad")


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that a training step keeps for its backward pass, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(storage.nbytes() for storage in kept.values())
    y.sum().backward()
    return total


def test_dense_block_keeps_one_buffer_for_all_its_maps():
    planes, growth, layers, pixels = 4, 2, 3, 2 * 5 * 7
    x = reals(2, planes, 5, 7).requires_grad_()
    efficient = kept_bytes(dense_block(memory_efficient=True), x)
    plain = kept_bytes(dense_block(), x)
    buffer = (planes + layers * growth) * pixels * 8
    bottlenecks = layers * 2 * growth * pixels * 8
    assert (
        buffer + bottlenecks <= efficient <= buffer + bottlenecks + 2_000
    )  # and vectors of one value a channel
    normalised = sum(planes + i * growth for i in range(layers)) * pixels * 8
    assert plain <= buffer + 2 * bottlenecks + normalised + 2_000


def test_memory_efficient_training_gives_the_same_numbers():
    results = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = create_model(
            "densenet121", num_classes=3, memory_efficient=memory_efficient, **SMALL_DENSENET
        )
        model(reals(2, 3, 33, 33, dtype=torch.float32)).pow(2).sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, efficient in zip(*results, strict=True):
        assert torch.equal(plain, efficient)


def test_dense_connections():
    for name, block in on_meta("densenet121").features.named_children():
        if isinstance(block, DenseBlock):
            assert block.connections == len(block) * (len(block) + 1) // 2, name


def test_densenet_options():
    model = on_meta("densenet_bc100_12", depth=40, growth_rate=24, compression=0.25)
    assert [len(m) for m in model.features if isinstance(m, DenseBlock)] == [6, 6, 6]
    assert model.features.conv0.out_channels == 48
    assert model.features.transition1.conv.out_channels == (48 + 6 * 24) // 4
    assert isinstance(model, DenseNet)
    assert on_meta("densenet40_12").features.transition1.conv.out_channels == 16 + 12 * 12
