"""The parts of PyTorch's own suite that are in its wheel: op_db, module_db, gradcheck. Nothing here knows of cuda_cnn.

tests/test_testing.py runs this file under the plugin cuda_cnn.testing.
"""

import copy
import itertools

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

OPERATORS = [
    *(
        "nn.functional.conv2d",
        "nn.functional.conv1d",
        "nn.functional.conv3d",
        "nn.functional.conv_transpose2d",
    ),
    *("nn.functional.max_pool2d", "nn.functional.batch_norm", "nn.functional.local_response_norm", "cat"),
]
MODULES = ["Conv2d", "ConvTranspose2d", "BatchNorm2d", "MaxPool2d", "LocalResponseNorm"]


def spread(samples, every=5):
    """Some of them: max_pool2d has 1,440."""
    return itertools.islice(samples, 0, 150, every)


def op_info(name):
    return next(op for op in op_db if op.name == name and not op.variant_test_name)


def tensors_of(sample):
    given = [sample.input, *sample.args, *sample.kwargs.values()]
    flat = [t for a in given for t in (a if isinstance(a, list | tuple) else [a])]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad and 0 < t.numel() < 200]


@pytest.mark.parametrize("second", [False, True], ids=["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives(name, second):
    info, checked = op_info(name), 0
    for sample in spread(info.sample_inputs("cpu", torch.float64, requires_grad=True)):
        leaves = tensors_of(sample)

        def function(*_, sample=sample):
            y = info.op(sample.input, *sample.args, **sample.kwargs)
            return y[0] if isinstance(y, tuple) else y

        y = function()
        if leaves and 0 < y.numel() < 200:
            check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
            assert check(function, leaves, fast_mode=True)
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("name", [n for n in OPERATORS if not n.endswith(("1d", "3d", "transpose2d"))])
def test_reference_and_dtypes(name):
    """A sample in float32 and bfloat16 is near the same in float64."""
    info = op_info(name)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for sample in spread(info.sample_inputs("cpu", dtype), 7) if dtype in info.dtypes else ():
            exact = sample.transform(
                lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            )
            results = [info.op(copy.copy(s.input), *s.args, **s.kwargs) for s in (sample, exact)]
            values = [r[0] if isinstance(r, tuple) else r for r in results]
            torch.testing.assert_close(values[0].double(), values[1].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in OPERATORS if op_info(n).error_inputs_func])
def test_error_inputs(name):
    for error in op_info(name).error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            op_info(name).op(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training):
    """Both memory formats give the same, and PyTorch's reference where module_db has one."""
    info = next(m for m in module_db if m.module_cls is getattr(torch.nn, name))
    for given in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training):
        build, call = given.constructor_input, given.forward_input
        module = info.module_cls(*build.args, **build.kwargs).double().train(training)
        state = copy.deepcopy(module.state_dict())
        y = module(*call.args, **call.kwargs)
        values = y if isinstance(y, tuple) else (y,)
        if given.reference_fn is not None:
            module.load_state_dict(state)
            expected = given.reference_fn(module, *call.args, **call.kwargs)
            torch.testing.assert_close(y, expected)
        module.load_state_dict(state)
        last = [a.to(memory_format=torch.channels_last) if a.dim() == 4 else a for a in call.args]
        again = module(*last, **call.kwargs)
        torch.testing.assert_close(again if isinstance(again, tuple) else (again,), values)
