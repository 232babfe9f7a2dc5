"""explain: a row for each call, with the algorithm that really runs, its reason and the copies paid."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cuda_cnn
from cuda_cnn import cli
from cuda_cnn.ops import conv2d


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.deep = nn.Conv2d(32, 32, 3, padding=1)
        self.each = nn.Conv2d(32, 32, 3, groups=32)
        self.lrn = nn.LocalResponseNorm(3)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(64, 4, 2)

    def forward(self, x):
        x = F.max_pool2d(self.lrn(self.each(self.deep(self.stem(x)))), 2)
        return self.drop(self.up(torch.cat([x, x], 1)))


class Cat(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 1)


def rows(model, x):
    return {(r.layer, r.operator): r for r in cuda_cnn.explain(model, x).rows}


def test_converted_and_not():
    model, x = Net(), torch.randn(2, 3, 12, 12)
    before = rows(model, x)
    assert not any(r.ours for r in before.values())
    assert before["deep", "conv2d"].reason == "torch.nn.Conv2d is not converted"
    assert before["lrn", "local_response_norm"].reason == "torch.nn.LocalResponseNorm is not converted"
    cuda_cnn.convert(model)
    after = rows(model, x)
    assert list(after) == list(before)
    ours = {key for key, r in after.items() if r.ours}
    assert ours == {
        ("stem.0", "conv2d"),
        ("stem.1", "batch_norm"),
        ("deep", "conv2d"),
        ("each", "conv2d"),
        ("lrn", "local_response_norm"),
    }
    assert (
        after["", "max_pool2d"].reason
        == "aten::max_pool2d_with_indices called as a function: cuda_cnn.use serves it"
    )
    assert after["", "concat"].input == (2, 32, 5, 5) and after["", "concat"].output == (2, 64, 5, 5)
    assert after["up", "conv2d"].reason == "there is no kernel for it"
    with cuda_cnn.use(exclude="max_pool2d"):
        used = rows(model, x)
    assert used["", "concat"].ours and used["", "max_pool2d"].reason == "max_pool2d is excluded"
    assert used["up", "conv2d"].reason == "2-D transposed"


def test_algorithms_are_those_that_run():
    model = Net()
    cuda_cnn.convert(model)
    found = rows(model, torch.randn(2, 3, 12, 12))
    for name, size in {"stem.0": 12, "deep": 12, "each": 12}.items():
        layer = model.get_submodule(name)
        shape = (2, layer.in_channels, size, size)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        names = [
            conv2d.algorithm(d, shape, layer.weight.shape, *geometry, nchw=True)
            for d in ("forward", "input_grad", "weight_grad")
        ]
        assert found[name, "conv2d"].algorithm == "/".join(names)
        assert found[name, "conv2d"].reason
    with cuda_cnn.backends.flags(conv2d_algorithm="reference"):
        assert rows(model, torch.randn(2, 3, 12, 12))["deep", "conv2d"].algorithm.startswith("reference")


def test_copies():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 6, 6)
    cuda_cnn.convert(model)
    (row,) = cuda_cnn.explain(model, x).rows
    assert (
        row.layout == "NCHW" and row.algorithm == "gemm_nchw/few_channels/gemm_nchw" and row.conversions == ()
    )
    with cuda_cnn.backends.flags(conv2d_algorithm="gemm"):
        (row,) = cuda_cnn.explain(model, x).rows
    assert row.layout == "NCHW" and row.conversions == ("input to NHWC", "weight to NHWC", "output to NCHW")
    assert row.converted_bytes == 4 * (2 * 3 * 36 + 8 * 3 * 9 + 2 * 8 * 16)
    model.to(memory_format=torch.channels_last)
    (row,) = cuda_cnn.explain(model, x.to(memory_format=torch.channels_last)).rows
    assert row.layout == "NHWC" and row.conversions == () and row.converted_bytes == 0
    wide = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    (row,) = cuda_cnn.explain(model, wide[:, :3]).rows
    assert row.layout == "NHWC slice" and row.conversions == ()
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = cuda_cnn.explain(model, x.to(memory_format=torch.channels_last)).rows
    assert row.dtype == "bfloat16" and "float32→bfloat16" in row.conversions


def test_nothing_stays():
    model = Net().train()
    cuda_cnn.convert(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    cuda_cnn.explain(model, torch.randn(2, 3, 12, 12, generator=torch.Generator()))
    with pytest.raises(RuntimeError):
        cuda_cnn.explain(model, torch.randn(2, 5, 12, 12, generator=torch.Generator()))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(generator, torch.get_rng_state()) and model.training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(TypeError, match=r"explain: expected model to be a torch.nn.Module"):
        cuda_cnn.explain(F.relu, torch.ones(1))


def test_text_html_and_data():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    cuda_cnn.convert(model, ops="conv2d")
    found = cuda_cnn.explain(model, torch.ones(1, 3, 8, 8))
    lines = str(found).splitlines()
    assert len(lines) == 4 and lines[1].startswith("0 ") and "1×3×8×8" in lines[1]
    assert lines[-1].startswith("1 calls on these kernels, 1 on PyTorch's")
    assert json.loads(json.dumps(found.data()))[0]["operator"] == "conv2d"
    assert found.html().count("<tr") == 3 and "torch.nn.MaxPool2d is not converted" in found.html()


def test_on_the_command_line(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["explain", "lenet5", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert (
        "subsample" in text
        and "0 on PyTorch's" in text
        and page.read_text().count("<tr") == text.count("\n") - 1
    )
    assert (
        cli.main(
            ["explain", "lenet5_modern", "--json", "--input", "2x1x36x32", "--nchw", "--dtype", "float64"]
        )
        == 0
    )
    first = json.loads(capsys.readouterr().out)[0]
    assert first["input"] == [2, 1, 36, 32] and first["dtype"] == "float64"
    for wrong in (["lenet6"], ["lenet5", "--input", "3x3"], ["keras:resnet"]):
        assert cli.main(["explain", *wrong]) == 2
        assert capsys.readouterr().err.startswith("cuda-cnn explain:")


def test_fused_networks_are_shown_as_they_run():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 6, 1))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(block, nn.LocalResponseNorm(3)), nn.MaxPool2d(2))
    cuda_cnn.convert(model)
    cuda_cnn.fuse(model[1])
    forward, x = model[1].forward, torch.randn(2, 3, 8, 8)
    found = cuda_cnn.explain(model, x).rows
    assert [(r.layer, r.operator) for r in found] == [
        ("0", "conv2d"),
        ("1.0.0", "conv2d_fused"),
        ("1.0.3", "conv2d_fused"),
        ("1.1", "local_response_norm"),
        ("2", "max_pool2d"),
    ]
    few = "few input channels: the tile of a matrix product would be mostly empty"
    gemm = "matrix products on channels, the general case"
    assert [r.reason for r in found[1:3]] == [
        f"statistics in its epilogue; {few}",
        f"norm and ReLU on its load; {gemm}",
    ]
    assert [r.algorithm for r in found[:3]] == [
        "gemm_nchw/gemm_nchw/gemm_nchw",
        "few_channels/few_channels/gemm",
        "gemm/gemm/gemm",
    ]
    assert all(r.ours for r in found) and model[1].forward is forward
    (folded, *_) = (r for r in cuda_cnn.explain(model.eval(), x).rows if r.operator == "conv2d_fused")
    assert folded.layer == "1.0.0" and folded.reason == f"norm folded in, ReLU; {few}"


class Mapped(nn.Module):
    """A depthwise convolution with a ReLU, or nothing, on its load."""

    def forward(self, x, relu):
        return cuda_cnn.functional.conv2d_fused(x, torch.ones(32, 1, 3, 3), None, None, None, relu, groups=32)


def test_fused_convolutions_name_the_algorithm_that_they_take():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    cuda_cnn.convert(model)
    cuda_cnn.fuse(model)
    x = torch.randn(2, 3, 12, 12)
    found = rows(model, x)
    assert found["1", "conv2d_fused"].algorithm == "winograd/winograd/winograd"
    assert found["1", "conv2d_fused"].reason.startswith("statistics in its epilogue; 3×3 to 5×5")
    assert found["2", "channel_map"].algorithm == "channels"
    with cuda_cnn.backends.flags(winograd=False):
        assert rows(model, x)["1", "conv2d_fused"].algorithm == "gemm/gemm/gemm"
    # The depthwise kernel cannot map what it loads, and the input gradient's load is another.
    x = torch.randn(1, 32, 5, 5)
    names = [cuda_cnn.explain(Mapped(), x, relu).rows[0].algorithm for relu in (False, True)]
    assert names == ["depthwise/depthwise/depthwise", "gemm/depthwise/gemm"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_every_row_of_ours_names_its_kernel_and_why(layout):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.LocalResponseNorm(3))
    cuda_cnn.convert(model)
    rows = cuda_cnn.explain(model, torch.randn(2, 4, 6, 6).to(memory_format=layout)).rows
    kernel = "planes" if layout == torch.contiguous_format else "channels"
    assert [r.algorithm for r in rows] == [kernel] * 3
    assert all(r.reason.startswith("NCHW" if kernel == "planes" else "NHWC") for r in rows)
    with cuda_cnn.use():
        (row,) = cuda_cnn.explain(Cat(), torch.ones(1, 2, 3, 3)).rows
    assert (row.algorithm, row.reason) == ("copies", "rows of the result, from front to back")
