"""CIFAR's two file formats and folders of pictures, good and bad."""

import pickle
import sys

import numpy
import pytest
import torch
from torch import Tensor

from cuda_cnn.train.augmentation import build
from cuda_cnn.train.crops import Crop
from cuda_cnn.train.data import DataError, load_data
from cuda_cnn.train.imagefolder import DEVIATION, MEAN, imagefolder
from cuda_cnn.train.loop import Trainer
from cuda_cnn.train.recipes import Recipe

PIL = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def cifar_pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3072), generator=generator, dtype=torch.uint8), torch.arange(n) % 10


def write_cifar10(folder, form: str) -> list[tuple[Tensor, Tensor]]:
    batches = [cifar_pictures(20, seed) for seed in range(6)]
    for name, (pixels, labels) in zip(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], batches, strict=True
    ):
        if form == "bin":
            rows = torch.cat([labels.to(torch.uint8)[:, None], pixels], 1)
            (folder / f"{name}.bin").write_bytes(rows.numpy().tobytes())
        else:
            batch = {b"data": pixels.numpy(), b"labels": labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class{i}" for i in range(10)]
    if form == "bin":
        (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(
            pickle.dumps({b"label_names": [n.encode() for n in names]}, protocol=2)
        )
    return batches


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-"])
def test_cifar10(tmp_path, form, inside):
    place = tmp_path / f"{inside}{form}" if inside else tmp_path
    place.mkdir(exist_ok=True)
    batches = write_cifar10(place, form)
    data = load_data(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.test), data.shape) == (100, 20, (3, 32, 32))
    assert data.classes == [f"class{i}" for i in range(10)]
    raw = torch.cat([pixels for pixels, _ in batches[:5]]).view(-1, 3, 32, 32).double().div(255)
    mean, deviation = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(data.train.images.double(), (raw - mean) / deviation, rtol=1e-4, atol=1e-5)
    test = batches[5][0].view(-1, 3, 32, 32).double().div(255)
    torch.testing.assert_close(data.test.images.double(), (test - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert torch.equal(data.train.labels, torch.cat([labels for _, labels in batches[:5]]))


def test_cifar100_takes_the_fine_label(tmp_path):
    pixels, _ = cifar_pictures(100, 0)
    fine = torch.arange(100, dtype=torch.uint8)
    rows = torch.cat([(fine // 5)[:, None], fine[:, None], pixels], 1).numpy().tobytes()
    for name in ("train", "test"):
        (tmp_path / f"{name}.bin").write_bytes(rows)
    data = load_data(f"cifar100:{tmp_path}")
    assert torch.equal(data.train.labels, torch.arange(100))
    assert data.classes[99] == "99"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "data_batch_3.bin").write_bytes(b"\0" * 5000),
            "data_batch_3.bin: truncated: 5000 bytes",
        ),
        (lambda f: (f / "data_batch_3.bin").write_bytes(b""), "data_batch_3.bin: truncated: 0 bytes"),
        (lambda f: (f / "data_batch_3.bin").unlink(), "data_batch_3.bin: cannot be read"),
        (lambda f: (f / "test_batch.bin").write_bytes(b"\x0b" + b"\0" * 3072), "expected labels 0 to 9"),
        (lambda f: (f / "test_batch.bin").unlink(), "no test_batch.bin and no test_batch in it"),
    ],
)
def test_damaged_binary_cifar(tmp_path, damage, message):
    write_cifar10(tmp_path, "bin")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_data(f"cifar10:{tmp_path}")


class Trap:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Trap()), "it names builtins.print"),
        (
            pickle.dumps({b"data": numpy.zeros((2, 3072), numpy.uint8), b"labels": [1, 2]})[:-40],
            "truncated, corrupt",
        ),
        (pickle.dumps([1, 2]), "not a CIFAR file"),
        (pickle.dumps({b"data": numpy.zeros((2, 3072), numpy.uint8)}), "not a batch of CIFAR pictures"),
        (
            pickle.dumps({b"data": numpy.zeros((2, 30), numpy.uint8), b"labels": [1, 2]}),
            "not a batch of CIFAR pictures",
        ),
    ],
)
def test_damaged_pickled_cifar(tmp_path, content, message, capsys):
    write_cifar10(tmp_path, "py")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"cifar10:{tmp_path}")
    assert "must not run" not in capsys.readouterr().out


def write_pictures(
    folder, count: int, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)
) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        PIL.new("RGB", size, colour).save(folder / f"{i}.png")


def test_imagefolder_with_its_own_test(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        write_pictures(tmp_path / part / "blue", count, (0, 0, 255))
        write_pictures(tmp_path / part / "red", count, (255, 0, 0), size=(300, 400))
    data = load_data(f"imagefolder:{tmp_path}")
    assert (len(data.train), len(data.test), data.classes) == (6, 4, ["blue", "red"])
    picture, label = data.train[5]
    assert picture.shape == data.shape == (3, 256, 256)
    assert label == 1
    expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(picture, expected.view(3, 1, 1).expand_as(picture))


def test_imagefolder_holds_out_a_fifth(tmp_path):
    write_pictures(tmp_path / "a", 10, (0, 0, 0))
    write_pictures(tmp_path / "b", 5, (255, 255, 255))
    data = load_data(f"imagefolder:{tmp_path}")
    assert sorted(data.test.labels.tolist()) == [0, 0, 1]
    assert len(data.train) == 12
    assert not set(data.train.files) & set(data.test.files)


def test_imagefolder_skips_what_it_cannot_read(tmp_path, capsys):
    write_pictures(tmp_path / "a", 6, (0, 0, 0))
    write_pictures(tmp_path / "b", 6, (9, 9, 9))
    (tmp_path / "a" / "broken.jpg").write_bytes(b"not a picture")
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "notes.txt").write_text("not a picture either")
    data = load_data(f"imagefolder:{tmp_path}")
    assert len(data.train) + len(data.test) == 12
    assert "skipped 2 unreadable pictures, the first:" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"broken\.jpg: not a readable picture"):
        imagefolder(str(tmp_path), strict=True)


def test_imagefolder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load_data("imagefolder:")
    with pytest.raises(DataError, match="holds no folders of pictures"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no readable picture"):
        load_data(f"imagefolder:{tmp_path}")
    for part, name in (("train", "a"), ("test", "b")):
        write_pictures(tmp_path / "odd" / part / name, 1, (0, 0, 0))
    with pytest.raises(DataError, match=r"train and test hold different classes \(a, b\)"):
        load_data(f"imagefolder:{tmp_path / 'odd'}")


def test_a_network_trains_on_a_folder(tmp_path):
    write_pictures(tmp_path / "dark", 5, (0, 0, 0))
    write_pictures(tmp_path / "light", 5, (255, 255, 255))
    augment = [{"name": "crop", "size": 64}]
    recipe = Recipe("resnet20", epochs=1, batch_size=4, augment=augment, threads=1)
    trainer = Trainer(recipe, load_data(f"imagefolder:{tmp_path}"))
    trainer.data.test.side = 64
    assert len(trainer.fit().labels) == 2
    assert Crop(64)(torch.zeros(2, 3, 256, 256), torch.Generator()).shape[-1] == 64


# torchvision's


def test_a_torchvision_set_of_grey_pictures(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 6), ("t10k", 3)):
        for name, shape in (
            (f"{stem}-images-idx3-ubyte", (count, 28, 28)),
            (f"{stem}-labels-idx1-ubyte", (count,)),
        ):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            (raw / name).write_bytes(head + bytes([3] * torch.Size(shape).numel()))
    data = load_data(f"torchvision:FashionMNIST:{tmp_path}")
    assert (len(data.train), len(data.test), data.shape, len(data.classes)) == (6, 3, (1, 32, 32), 10)
    picture, label = data.train[5]
    assert label == 3 and picture.shape == (1, 32, 32)
    assert picture[0, 16, 16].item() == pytest.approx(3 / 255 * 1.275 - 0.1)
    trainer = Trainer(Recipe("lenet5_modern", epochs=1, batch_size=3, threads=1), data)
    assert len(trainer.fit().labels) == 3


def test_a_torchvision_set_of_coloured_pictures(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    for part in ("train", "valid", "test"):
        for name, colour in (("AA", (255, 0, 0)), ("BB", (0, 0, 255))):
            write_pictures(tmp_path / "country211" / part / name, 2, colour)
    data = load_data(f"torchvision:Country211:{tmp_path}")
    assert (len(data.train), len(data.test), data.shape, data.classes) == (4, 4, (3, 30, 30), ["AA", "BB"])
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(data.train[0][0][:, 0, 0], red)


def test_torchvision_sets_that_are_not_there(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with pytest.raises(DataError, match="unknown data set 'FashionMnist': did you mean 'FashionMNIST'"):
        load_data(f"torchvision:FashionMnist:{tmp_path}")
    with pytest.raises(DataError, match=r"torchvision:FashionMNIST:.*cannot be read"):
        load_data(f"torchvision:FashionMNIST:{tmp_path}")
    with pytest.raises(DataError, match="no training and test part"):
        load_data(f"torchvision:FakeData:{tmp_path}")


def test_torchvision_transforms_draw_from_the_generator():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    (step,) = build([{"name": "torchvision", "transform": "RandomErasing", "p": 1.0}])
    images, before = torch.ones(4, 3, 16, 16), torch.get_rng_state()
    one, same, other = (step(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="unknown transform 'RandomErase': did you mean 'RandomErasing'"):
        build([{"name": "torchvision", "transform": "RandomErase"}])


def test_torchvision_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="this needs torchvision"):
        load_data("torchvision:MNIST:x")
