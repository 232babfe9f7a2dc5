"""The benchmarks' layers, cases and counted work; nothing here depends on how long anything takes."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cuda_cnn import create_model
from cuda_cnn.bench import cases, rivals, settings, shapes, table
from cuda_cnn.bench.cases import Problem, UnavailableError, WrongResultError
from cuda_cnn.bench.devices import CpuDevice
from cuda_cnn.bench.shapes import NETWORKS, OPERATORS, Layer, layers
from cuda_cnn.bench.work import operand_shapes, output_shape, passes, work

CONV = {"filters": 4, "size": 3, "stride": 2, "padding": 1, "groups": 2, "bias": True}
SMALL = [
    Layer("x", "conv", "conv2d", (6, 9, 7), CONV),
    Layer("x", "bare", "conv2d", (5, 7, 3), {**CONV, "groups": 1, "bias": False, "stride": 1}),
    Layer("x", "pool", "max_pool2d", (5, 9, 7), {"size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    Layer("x", "norm", "local_response_norm", (7, 5, 3), {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}),
    Layer("x", "bn", "batch_norm", (5, 7, 3), {"training": True}),
    Layer("x", "cat", "concat", (5, 7, 3), {"others": (2, 1)}),
    Layer("x", "sub", "subsample", (5, 8, 6), {}),
]
EACH = pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)


@EACH
@pytest.mark.parametrize("layout", settings.LAYOUTS)
def test_cases_are_verified_and_agree(layer, layout):
    problem = Problem(layer, 3, layout=layout)
    for direction in passes(layer.op):
        found = [problem.case(direction, name) for name in ("cuda_cnn", "torch", "reference")]
        assert all(case.error < 1e-5 for case in found)
        outputs = [case.call.run() for case in found]
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in outputs[:2])):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@EACH
def test_every_pass_gives_its_gradients(layer):
    """dgrad and wgrad are parts of full: same numbers, and every operand's gradient is in one of them."""
    problem = Problem(layer, 2)
    forward = problem.case("forward", "cuda_cnn").call.run()
    assert forward.shape == output_shape(layer, 2)
    full = problem.case("full", "cuda_cnn").call.run()
    assert [g.shape for g in full] == [t.shape for t in problem.tensors]
    parts = [
        g for d in ("dgrad", "wgrad") if d in passes(layer.op) for g in problem.case(d, "torch").call.run()
    ]
    assert len(parts) == (2 if layer.op == "conv2d" else len(full))
    for part, whole in zip(parts, full):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad", "full"])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_is_not_timed(monkeypatch, direction, factor):
    right = cases.rivals.LIBRARIES["cuda_cnn"].conv2d
    monkeypatch.setattr(rivals.F, "conv2d", lambda *a: right(*a) * factor)
    with pytest.raises(WrongResultError, match="against float64"):
        Problem(SMALL[0], 2).case(direction, "cuda_cnn")


def test_another_dtype_or_layout_does_not_pass_unseen(monkeypatch):
    right = rivals.F.conv2d
    monkeypatch.setattr(rivals.F, "conv2d", lambda *a: right(*a).bfloat16())
    with pytest.raises(settings.UnequalError, match=r"expected torch.float32 .*, got torch.bfloat16"):
        Problem(SMALL[0], 2).case("forward", "cuda_cnn")
    monkeypatch.setattr(rivals.F, "conv2d", lambda *a: right(*a).contiguous())
    assert Problem(SMALL[0], 2).case("forward", "cuda_cnn").notes == [
        "gives another layout than channels_last"
    ]


def test_variants_are_forced_only_while_they_run():
    layer = Layer("x", "conv", "conv2d", (32, 8, 8), {**CONV, "filters": 32, "stride": 1, "groups": 1})
    problem = Problem(layer, 1)
    assert problem.case("forward", "cuda_cnn").algorithm == "winograd"
    case = problem.case("forward", "cuda_cnn:gemm")
    assert case.algorithm == "gemm" and cases.backends.conv2d_algorithm == "auto"
    with case.call.around():
        assert cases.backends.conv2d_algorithm == "gemm"
    before = cases._C.cpu_isa()
    with problem.case("forward", "cuda_cnn:baseline").call.around():
        assert cases._C.cpu_isa() == "baseline"
    assert cases._C.cpu_isa() == before
    with pytest.raises(ValueError, match="conv2d_algorithm that exists, got 'fft'"):
        problem.case("forward", "cuda_cnn:fft")
    with pytest.raises(UnavailableError, match="has no algorithm 'gemm'"):
        Problem(SMALL[2], 1).case("forward", "cuda_cnn:gemm")
    with pytest.raises(UnavailableError, match="needs a GPU"):
        problem.case("forward", "cudnn")
    with pytest.raises(ValueError, match="unknown implementation 'tourch': did you mean 'torch'"):
        problem.case("forward", "tourch")


# ---- Layers ---------------------------------------------------------------------------------------------


def test_every_operator_and_network_is_in_the_demo():
    chosen = [layer for n, name, _ in table.DEMO_LAYERS for layer in layers(n) if layer.name == name]
    assert {layer.op for layer in chosen} == set(OPERATORS)
    assert {layer.network for layer in chosen} == set(NETWORKS)
    assert {name for _, name, _ in table.DEMO_LAYERS} == {layer.name for layer in chosen}


@pytest.mark.parametrize(
    ("network", "counts"),
    [
        ("lenet5", {"conv2d": 4, "subsample": 2}),
        ("alexnet", {"conv2d": 5, "max_pool2d": 3, "local_response_norm": 2}),
        ("vgg16", {"conv2d": 13, "max_pool2d": 5}),
        ("resnet50", {"conv2d": 53, "batch_norm": 53, "max_pool2d": 1}),
        ("densenet121", {"conv2d": 120, "batch_norm": 121, "max_pool2d": 1, "concat": 58}),
        # 57 convolutions of Table 1 and one in each auxiliary classifier
        ("googlenet", {"conv2d": 59, "max_pool2d": 13, "local_response_norm": 2, "concat": 9}),
    ],
)
def test_layers_are_all_of_the_papers(network, counts):
    found = layers(network)
    assert {
        op: n for op in OPERATORS if (n := sum(layer.count for layer in found if layer.op == op))
    } == counts
    keys = [(layer.op, layer.shape, tuple(layer.args.items())) for layer in found]
    assert len(keys) == len(set(keys))


def test_traced_layers_are_those_that_hooks_see():
    """ResNet-50's modules, looked at another way: by hooks, on the meta device."""
    seen = set()

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            window = module.out_channels, module.kernel_size[0], module.stride[0], module.padding[0]
            seen.add((*inputs[0].shape[1:], *window, tuple(output.shape[1:])))

    with torch.device("meta"):
        model = create_model("resnet50")
        for module in model.modules():
            module.register_forward_hook(note)
        model(torch.empty(2, 3, 224, 224))
    names = ("filters", "size", "stride", "padding")
    traced = {
        (*layer.shape, *(layer.args[name] for name in names), output_shape(layer, 2)[1:])
        for layer in layers("resnet50", "conv2d")
    }
    assert traced == seen


def test_unknown_names_are_suggested():
    with pytest.raises(ValueError, match="unknown network 'vgg61': did you mean 'vgg16'"):
        layers("vgg61")
    with pytest.raises(ValueError, match="unknown operator 'conv3d': did you mean 'conv2d'"):
        layers(op="conv3d")
    with pytest.raises(ValueError, match="expected a square window"):
        shapes._one((3, 5))


# ---- FLOPs and bytes --------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("library", ["torch", "cuda_cnn"])
def test_flops_are_those_of_torchs_counter(layer, library):
    problem = Problem(layer, 3)
    for direction in passes(layer.op):
        case = problem.case(direction, library)
        with FlopCounterMode(display=False) as counter:
            case.call.run()
        ours, counted = work(layer, direction, 3, torch.float32).flops, counter.get_total_flops()
        groups = layer.args.get("groups", 1)
        if library == "torch" and groups > 1 and direction in ("wgrad", "full"):
            # torch's formula for its own weight gradient forgets the groups.
            counted -= (groups - 1) * work(layer, "wgrad", 3, torch.float32).flops
        assert ours == counted, direction


@pytest.mark.parametrize(
    "layer",
    [*layers("alexnet"), *layers("googlenet", "max_pool2d"), *layers("resnet50", "conv2d")[:6]],
    ids=str,
)
def test_shapes_and_flops_of_real_layers(layer):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = rivals.apply(rivals.TORCH, layer, [torch.empty(s) for s in operand_shapes(layer, 2)])
    assert y.shape == output_shape(layer, 2)
    assert work(layer, "forward", 2, torch.float32).flops == counter.get_total_flops()


@EACH
def test_bytes_are_those_of_the_tensors_of_the_pass(layer):
    """Everything that enters and leaves, once: counted from the tensors themselves."""
    problem = Problem(layer, 3, "bfloat16")
    y = problem.case("forward", "cuda_cnn").call.run()
    operands = sum(t.nbytes for t in problem.tensors)
    assert work(layer, "forward", 3, torch.bfloat16).bytes == operands + y.nbytes
    for direction in passes(layer.op)[1:-1]:
        gradients = problem.case(direction, "cuda_cnn").call.run()
        read = y.nbytes + {  # dy, and what else the formula of the gradient has
            ("conv2d", "dgrad"): problem.tensors[1].nbytes if layer.op == "conv2d" else 0,
            ("conv2d", "wgrad"): problem.tensors[0].nbytes,
            ("concat", "dgrad"): 0,
            ("max_pool2d", "dgrad"): 0,
        }.get((layer.op, direction), operands)
        assert work(layer, direction, 3, torch.bfloat16).bytes == read + sum(g.nbytes for g in gradients)


def test_full_is_the_sum_of_its_parts_for_a_convolution():
    parts = [work(SMALL[1], d, 3, torch.float32) for d in passes("conv2d")]
    assert parts[3].flops == sum(p.flops for p in parts[:3])
    assert parts[3].bytes == sum(p.bytes for p in parts[:3])
    bias = work(SMALL[0], "full", 3, torch.float32).bytes - sum(
        work(SMALL[0], d, 3, torch.float32).bytes for d in passes("conv2d")[:3]
    )
    assert bias == 4 * prod(operand_shapes(SMALL[0], 3)[2])
    with pytest.raises(ValueError, match="max_pool2d has no pass 'wgrad'"):
        work(SMALL[2], "wgrad", 1, torch.float32)


# ---- Settings -------------------------------------------------------------------------------------------


def test_unequal_settings_are_refused(monkeypatch):
    settings.check_equal("float32", "cpu")
    with pytest.raises(settings.UnequalError, match="a GPU's"):
        settings.check_equal("tf32", "cpu")
    with torch.autocast("cpu"), pytest.raises(settings.UnequalError, match="autocast is on"):
        settings.check_equal("float32", "cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(settings.UnequalError, match=r"mkldnn\.matmul\.fp32_precision is 'bf16'"):
            settings.check_equal("float32", "cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_holds_for_both_and_only_for_the_block():
    before = torch.backends.cudnn.allow_tf32
    for name in ("float32", "tf32"):
        with settings.precision(name):
            assert (
                torch.backends.cudnn.allow_tf32 == (name == "tf32") == torch.backends.cuda.matmul.allow_tf32
            )
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="CUDA graphs need --device cuda"):
        CpuDevice().clock("graph")
