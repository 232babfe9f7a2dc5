"""A converted and a fused network under the rest of PyTorch: each tool gives what it gives for torch's own layers.

DistributedDataParallel and FSDP2 are in test_convert_distributed.py, pickles and torch.save in test_convert.py and
test_fuse.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cuda_cnn


def network(groups=2):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(8, 6, 3, groups=groups), nn.LocalResponseNorm(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 4),
    )


def pair(form="converted", dtype=torch.float32, groups=2):
    model = network(groups).to(dtype)
    ours = copy.deepcopy(model)
    cuda_cnn.convert(ours, strict=True)
    if form == "fused":
        assert len(cuda_cnn.fuse(ours).fused) == 4
    return ours, model


forms = pytest.mark.parametrize("form", ["converted", "fused"])


def batch(n=4, size=10, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(model, x, call=None):
    model.zero_grad()
    y = (call or model)(x)
    y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def close(ours, torchs, tolerance=2e-5):
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


def test_compile_fullgraph_with_dynamic_shapes():
    ours, model = (module[:6] for module in pair(dtype=torch.float64))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for n, size in ((4, 10), (3, 12)):
        x = batch(n, size, torch.float64)
        close(gradients(ours, x, compiled), gradients(model, x), 1e-10)


def test_compile_and_export_of_a_fused_network_see_its_own_forward():
    ours, model = pair("fused")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(gradients(ours, batch(), compiled), gradients(model, batch()))
    program = torch.export.export(ours.eval(), (batch(),))
    close(program.module()(batch()), model.eval()(batch()))
    # The program of the network that is not fused, which the next test hands to AOTInductor.
    converted = torch.export.export(cuda_cnn.unfuse(copy.deepcopy(ours)), (batch(),))
    assert "cuda_cnn.conv2d.default" in program.graph_module.code
    assert program.graph_module.code == converted.graph_module.code


def test_export_and_aot_inductor(tmp_path):
    ours, model = (module.eval()[:6] for module in pair())
    size = torch.export.Dim("n", min=2, max=9)
    program = torch.export.export(ours, (batch(),), dynamic_shapes=({0: size},))
    close(program.module()(batch(7)), model(batch(7)))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    close(torch._inductor.aoti_load_package(package)(batch(5)), model(batch(5)))


def test_func():
    ours, model = pair(dtype=torch.float64)
    ours.eval(), model.eval()
    x = batch(dtype=torch.float64)

    def per_sample(module):
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

        def loss(parameters, image):
            return torch.func.functional_call(module, (parameters, buffers), (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    ours_grads, torch_grads = per_sample(ours), per_sample(model)
    assert ours_grads.keys() == torch_grads.keys()
    for name in ours_grads:
        close(ours_grads[name], torch_grads[name], 1e-9)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_scaler(dtype, form):
    ours, model = pair(form)
    results = []
    for module in (ours, model):
        optimiser, scaler = (
            torch.optim.SGD(module.parameters(), lr=0.1),
            torch.amp.GradScaler("cpu", init_scale=64.0),
        )
        for _ in range(2):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype):
                y = module(batch())
            assert y.dtype == dtype
            scaler.scale(y.float().square().mean()).backward()
            scaler.step(optimiser)
            scaler.update()
        results.append([y.detach().float(), *(p.detach() for p in module.parameters())])
        assert scaler.get_scale() == 64.0
    close(*results, tolerance=3e-2)


@forms
def test_a_scaler_skips_the_step_whose_gradients_overflow(form):
    """Whatever the layers do in float16, an infinity on the way back must reach the parameters as one."""
    for module in pair(form):
        optimiser, scaler = (
            torch.optim.SGD(module.parameters(), lr=0.1),
            torch.amp.GradScaler("cpu", init_scale=2.0**40),
        )
        before = copy.deepcopy(list(module.parameters()))
        with torch.autocast("cpu", torch.float16):
            y = module(batch())
        scaler.scale(y.float().square().mean()).backward()
        assert not all(p.grad.isfinite().all() for p in module[0].parameters())
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        assert all(map(torch.equal, module.parameters(), before))


@forms
def test_fake_tensors_and_flops(form):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    ours, model = pair(form)
    for module in (ours, model):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = module(mode.from_tensor(batch()))
            assert y.shape == (4, 4) and y.stride() == (4, 1)
    # Without groups: torch's own formula counts a grouped layer's weight gradient once for each.
    counts = []
    for module in pair(form, groups=1):
        with FlopCounterMode(display=False) as counter:
            module(batch()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_profiler_names():
    ours, _ = pair()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(batch()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    forward = {"conv2d", "batch_norm", "local_response_norm", "max_pool2d_with_taps"}
    backward = {"conv2d_input_grad", "conv2d_weight_grad", "batch_norm_backward", "max_pool2d_backward"}
    assert {f"cuda_cnn::{name}" for name in forward | backward} <= names
    cuda_cnn.fuse(ours)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(batch()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"cuda_cnn::conv2d_fused", "cuda_cnn::conv2d_fused_backward", "cuda_cnn::channel_map"} <= names


@forms
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing(reentrant, form):
    ours, _ = pair(form)
    expected = [g.clone() for g in gradients(ours.eval(), batch())]
    x = batch().requires_grad_()
    again = gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=reentrant))
    assert all(map(torch.equal, again, expected))


def test_symbolic_trace():
    ours, model = pair()
    ours.eval(), model.eval()
    traced = torch.fx.symbolic_trace(ours)
    same = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in same.graph.nodes]
    close(traced(batch()), model(batch()))
    cuda_cnn.revert(traced)
    assert torch.equal(traced(batch()), model(batch()))
    layer = cuda_cnn.nn.Conv2d(3, 2, 1)
    assert torch.equal(torch.fx.symbolic_trace(layer)(batch()), layer(batch()))

    class Functional(nn.Module):
        def forward(self, x, w):
            return cuda_cnn.functional.max_pool2d(cuda_cnn.functional.conv2d(x, w), 2)

    traced = torch.fx.symbolic_trace(Functional())
    w = torch.ones(2, 3, 3, 3)
    assert torch.equal(traced(batch(), w), F.max_pool2d(cuda_cnn.functional.conv2d(batch(), w), 2))


@forms
def test_deterministic_mode(form):
    ours, _ = pair(form)
    torch.use_deterministic_algorithms(True)
    try:
        first = [g.clone() for g in gradients(ours.eval(), batch())]
        assert all(map(torch.equal, gradients(ours, batch()), first))
    finally:
        torch.use_deterministic_algorithms(False)


@forms
def test_onnx_through_the_torch_form(form):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    ours, _ = pair(form)
    expected = ours.eval()(batch())
    plain = copy.deepcopy(ours)
    cuda_cnn.revert(plain)
    proto = torch.onnx.export(plain, (batch(),), dynamo=True, verbose=False).model_proto
    operators = {node.op_type for node in proto.graph.node}
    assert {"Conv", "MaxPool"} <= operators and {node.domain for node in proto.graph.node} == {""}
    (found,) = evaluator(proto).run(None, {proto.graph.input[0].name: batch().numpy()})
    close(torch.from_numpy(found), expected)
