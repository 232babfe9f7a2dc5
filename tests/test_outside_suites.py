"""PyTorch's own descriptions of its operators and modules, pointed at ours: every sample and every error input.

max_pool2d and concat, which are exact, meet theirs bitwise in test_max_pool2d.py and test_concat.py.
"""

import copy
import functools

import pytest
import torch
from helpers import assert_accurate
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from cuda_cnn import functional as F
from cuda_cnn import nn

OURS = {
    "nn.functional.conv2d": F.conv2d,
    "nn.functional.local_response_norm": F.local_response_norm,
    "nn.functional.batch_norm": F.batch_norm,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@functools.cache
def op_info(name):
    return next(op for op in op_db if op.name == name and not op.variant_test_name)


def to_double(value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_double(v) for v in value)
    return value


def tensors_of(*values):
    """The floating-point tensors in a sample, in order."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(*value)
    return found


def run(function, sample):
    """Result and gradients of all that requires one; what a call writes in place is a copy."""
    buffers = {"running_mean", "running_var"}
    args = [a.clone() if isinstance(a, torch.Tensor) and not a.requires_grad else a for a in sample.args]
    kwargs = {
        k: v.clone() if k in buffers and isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()
    }
    y = function(sample.input, *args, **kwargs)
    inputs = [t for t in tensors_of(sample.input, args, list(kwargs.values())) if t.requires_grad]
    result = tensors_of(y)
    if not inputs or not result[0].requires_grad:
        return result
    seed = torch.linspace(-1, 1, max(1, result[0].numel()), dtype=torch.float64)[: result[0].numel()]
    dy = seed.reshape(result[0].shape).to(result[0].dtype)
    grads = torch.autograd.grad(result[0], inputs, dy, allow_unused=True)
    return result + [g for g in grads if g is not None]


def doubled(sample):
    """The same sample in float64: its exact result."""
    twin = copy.copy(sample)
    twin.input, twin.args = to_double(sample.input), to_double(tuple(sample.args))
    twin.kwargs = {k: to_double(v) for k, v in sample.kwargs.items()}
    given = tensors_of(sample.input, sample.args, list(sample.kwargs.values()))
    copies = tensors_of(twin.input, twin.args, list(twin.kwargs.values()))
    for original, exact in zip(given, copies):
        exact.requires_grad_(original.requires_grad)
    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_every_sample(name, dtype):
    info = op_info(name)
    if dtype not in info.dtypes:
        pytest.skip(f"torch's own {name} has no {dtype} on a CPU")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        count += 1
        what = f"{name}, sample {count}: {sample.summary()}"
        ours, torchs = run(OURS[name], sample), run(info.op, sample)
        exact = run(info.op, doubled(sample))
        assert len(ours) == len(torchs), what
        for a, t, e in zip(ours, torchs, exact):
            assert a.dtype == t.dtype, what
            if dtype == torch.float64:
                torch.testing.assert_close(a, t, rtol=1e-11, atol=1e-13, msg=what)
            else:
                assert_accurate(a, e, t, ulps=8, what=what)
        if ours[0].numel():
            assert ours[0].stride() == torchs[0].stride(), what
    assert count > 5


@pytest.mark.parametrize("name", [name for name in OURS if op_info(name).error_inputs_func])
def test_every_error_input(name):
    count = 0
    for error in op_info(name).error_inputs("cpu"):
        sample = error.sample_input
        count += 1
        with pytest.raises(error.error_type):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
    assert count > 0


MODULES = {
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.LocalResponseNorm: nn.LocalResponseNorm,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("theirs", MODULES, ids=lambda m: m.__name__)
def test_every_module_input(theirs, training):
    info = next(m for m in module_db if m.module_cls is theirs)
    count = 0
    for given in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training):
        count += 1
        build, call = given.constructor_input, given.forward_input
        torch_module = theirs(*build.args, **build.kwargs).double().train(training)
        our_module = MODULES[theirs](*build.args, **build.kwargs).double().train(training)
        our_module.load_state_dict(torch_module.state_dict())
        assert list(our_module.state_dict()) == list(torch_module.state_dict())
        results = []
        for module in (our_module, torch_module):
            inputs = [a.detach().clone().requires_grad_() for a in call.args]
            y = module(*inputs, **call.kwargs)
            wanted = inputs + list(module.parameters())
            grads = torch.autograd.grad(tensors_of(y)[0].square().sum(), wanted)
            results.append([*tensors_of(y), *grads, *(b for b in module.buffers() if b.is_floating_point())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert count > 0
