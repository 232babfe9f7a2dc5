"""Weights from files: checkpoints, safetensors, torchvision's published ones; and what does not fit."""

import pytest
import torch

from cuda_cnn import create_model, load_weights
from cuda_cnn.models.weights import read_weights

SMALL = {"growth_rate": 4, "blocks": (2, 3), "init_planes": 8, "num_classes": 3}


def old_name(name: str) -> str:
    """denselayer1.norm1.weight as torchvision's published files have it: denselayer1.norm.1.weight."""
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        if "denselayer" in name:
            name = name.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
    return name


def test_published_densenet_files(tmp_path):
    torch.manual_seed(0)
    source, other = (create_model("densenet121", **SMALL) for _ in range(2))
    published = {
        old_name(k): v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer2.norm.1.weight" in published
    torch.save(published, tmp_path / "densenet.pth")
    assert load_weights(other, tmp_path / "densenet.pth") is other
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in source.state_dict().items())


def test_safetensors_and_prefixes(tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    source, other, third = (create_model("resnet20", num_classes=3) for _ in range(3))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "parallel.pth")
    for model, name in ((other, "weights.safetensors"), (third, "parallel.pth")):
        assert torch.equal(load_weights(model, tmp_path / name).fc.weight, source.fc.weight)


def test_auxiliary_classifiers_may_be_left_out(tmp_path):
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in create_model("googlenet_torchvision", num_classes=3).state_dict().items()
        }
    torch.save({k: torch.zeros(shape) for k, shape in shapes.items()}, tmp_path / "googlenet.pth")
    model = create_model("googlenet_torchvision", num_classes=3, aux_logits=False)
    assert (load_weights(model, tmp_path / "googlenet.pth").fc.weight == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7)},
            r"fc.weight is \[7, 64\] there",
        ),
        (lambda w: {**w, "fc2.weight": torch.zeros(1)}, "it has, and the network lacks, fc2.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "conv1.weight"}, "it lacks conv1.weight"),
        (lambda w: {}, "holds no state_dict"),
        (lambda w: [1, 2], "holds no state_dict"),
        (lambda w: {"epoch": 3}, "holds no state_dict"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    model = create_model("resnet20", num_classes=3)
    before = model.conv1.weight.clone()
    weights = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save(change(weights), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth: .*{message}"):
        load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.conv1.weight, before)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pth: no such file"):
        read_weights(tmp_path / "gone.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02not weights")
        with pytest.raises(ValueError, match=rf"{name}: not readable as weights"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "resnet18"])
def test_torchvisions_own_files(tmp_path, name):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    options = {"init_weights": False} if name == "googlenet" else {}
    theirs = getattr(torchvision.models, name)(num_classes=5, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    ours = create_model("googlenet_torchvision" if name == "googlenet" else name, num_classes=5).eval()
    load_weights(ours, tmp_path / f"{name}.pth")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
