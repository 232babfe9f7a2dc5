"""Data sets, IDX files and picture files, whole and damaged."""

import gzip
import struct

import pytest
import torch

from cuda_cnn.train import augmentation
from cuda_cnn.train.data import BACKGROUND, INK, DataError, ink, load_data, read_idx, split_held_out
from cuda_cnn.train.images import read_ink

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def idx(values: torch.Tensor, code: int = 8) -> bytes:
    kinds = {8: "B", 9: "b", 11: "h", 12: "i", 13: "f", 14: "d"}
    header = bytes([0, 0, code, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    numbers = values.flatten().tolist() if code > 12 else values.flatten().long().tolist()
    return header + struct.pack(f">{values.numel()}{kinds[code]}", *numbers)


def write_mnist(folder, train=12, test=5, packed=False, **damaged):
    """Four IDX files of random digits; `damaged` replaces a file's bytes."""
    generator = torch.Generator().manual_seed(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator)
        labels = torch.arange(count) % 10
        for name, content in (
            (f"{stem}-images-idx3-ubyte", idx(images)),
            (f"{stem}-labels-idx1-ubyte", idx(labels)),
        ):
            content = damaged.get(name[: name.index("-idx")].replace("-", "_"), content)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def test_digits_split_is_fixed_stratified_and_disjoint():
    data = load_data("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.train.images.shape[1:] == (1, 32, 32)
    counts = torch.bincount(data.test.labels), torch.bincount(data.train.labels)
    assert (counts[0] / (counts[0] + counts[1]) - 0.2).abs().max() < 0.01
    again = load_data("digits")
    assert torch.equal(data.test.images, again.test.images)


def test_split_parts_cover_everything_once():
    labels = torch.arange(37) % 3
    held = [split_held_out(labels, 5, part)[1] for part in range(5)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(37))
    kept, out = split_held_out(labels, 5, 2)
    assert set(kept.tolist()).isdisjoint(out.tolist()) and len(kept) + len(out) == 37


def test_ink_has_the_papers_levels_and_is_centred():
    white, black = ink(torch.zeros(1, 1, 8, 8)), ink(torch.ones(1, 1, 8, 8), box=20)
    assert white.shape == (1, 1, 32, 32) and white.eq(BACKGROUND).all()
    assert black[0, 0, 6:26, 6:26].sub(INK).abs().max() < 1e-6
    assert black[0, 0, :6].eq(BACKGROUND).all() and black[0, 0, :, 26:].eq(BACKGROUND).all()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_folder(tmp_path, packed):
    data = load_data(f"mnist:{write_mnist(tmp_path, packed=packed)}")
    assert (len(data.train), len(data.test)) == (12, 5)
    raw = read_idx(next(tmp_path.glob("train-images*")))
    torch.testing.assert_close(data.train.images[3, 0, 2:30, 2:30], raw[3] / 255 * 1.275 - 0.1)
    assert data.train.labels.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("code", [8, 9, 11, 12, 13, 14])
def test_idx_types_and_byte_order(tmp_path, code):
    values = torch.tensor([[1, 2, 100], [0, 5, 127]])
    (tmp_path / "x").write_bytes(idx(values, code))
    assert read_idx(tmp_path / "x").tolist() == values.tolist()


def test_idx_without_elements(tmp_path):
    (tmp_path / "x").write_bytes(idx(torch.zeros(0, 28, 28)))
    assert read_idx(tmp_path / "x").shape == (0, 28, 28)


WHOLE = idx(torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (WHOLE[:2], "not an IDX file"),
        (b"\0\0\x07\1\0\0\0\0", "not an IDX file"),
        (WHOLE[:10], "truncated"),
        (WHOLE[:-1], "truncated: shape \\[3, 4, 4\\] needs 64 bytes, the file has 63"),
        (WHOLE + b"x", "1 bytes more than shape"),
        (b"\0\0\x08\3" + b"\xff" * 12, "truncated"),
    ],
)
def test_damaged_idx_is_named(tmp_path, content, message):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DataError, match=f"broken: {message}"):
        read_idx(tmp_path / "broken")


@pytest.mark.parametrize("cut", [3, 12, -9])
def test_truncated_gzip_is_named(tmp_path, cut):
    (tmp_path / "broken.gz").write_bytes(gzip.compress(WHOLE)[:cut])
    with pytest.raises(DataError, match=r"broken\.gz: truncated or corrupt gzip"):
        read_idx(tmp_path / "broken.gz")


def test_corrupt_gzip_is_named(tmp_path):
    packed = bytearray(gzip.compress(idx(torch.arange(4000).reshape(10, 20, 20) % 251)))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "broken.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"broken\.gz"):
        read_idx(tmp_path / "broken.gz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"train_labels": idx(torch.zeros(11))}, "train-labels.* do not fit 12 pictures"),
        ({"train_labels": idx(torch.full((12,), 10))}, "train-labels.*labels 0 to 9, got 10"),
        ({"t10k_images": idx(torch.zeros(5, 28))}, "t10k-images.*expected pictures"),
        ({"t10k_images": WHOLE[:-2]}, "t10k-images.*truncated"),
        (
            {"train_images": idx(torch.zeros(0, 28, 28)), "train_labels": idx(torch.zeros(0))},
            "holds no picture",
        ),
    ],
)
def test_mnist_files_that_do_not_fit_are_named(tmp_path, damage, message):
    with pytest.raises(DataError, match=message):
        load_data(f"mnist:{write_mnist(tmp_path, **damage)}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data set 'digit': did you mean 'digits'"),
        ("mnist:", "is not a folder"),
        ("mnist:/no/such/folder", "/no/such/folder is not a folder"),
        ("digits:somewhere", "take no folder"),
    ],
)
def test_unknown_data_is_named(spec, message):
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_missing_mnist_file_is_named(tmp_path):
    (write_mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        load_data(f"mnist:{tmp_path}")


def draw_bar(path, mode="L", ink_value=0, paper=255, size=(60, 40)):
    """A tall bar, off centre."""
    image = Image.new(mode, size, paper)
    image.paste(ink_value, (10, 5, 16, 35))
    image.save(path)
    return path


def test_pictures_dark_on_light_and_light_on_dark_are_the_same(tmp_path):
    dark, light = draw_bar(tmp_path / "a.png"), draw_bar(tmp_path / "b.png", ink_value=255, paper=0)
    picture = read_ink(dark)
    torch.testing.assert_close(picture, read_ink(light), rtol=0, atol=1e-6)
    assert picture.shape == (1, 1, 32, 32)
    inked = (picture[0, 0] > 0.5).nonzero()
    assert inked.amin(0).tolist() == [2, 13] and inked.amax(0).tolist() == [
        29,
        18,
    ]  # 28 tall, 6 wide, centred
    assert picture.max() == pytest.approx(INK) and picture.min() == pytest.approx(BACKGROUND)


@pytest.mark.parametrize(
    ("mode", "ink_value", "paper"),
    [
        ("RGB", (0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),
        ("1", 0, 1),
        ("I;16", 0, 60000),
    ],
)
def test_picture_modes(tmp_path, mode, ink_value, paper):
    expected = read_ink(draw_bar(tmp_path / "grey.png"))
    torch.testing.assert_close(
        read_ink(draw_bar(tmp_path / "x.png", mode, ink_value, paper)), expected, rtol=0, atol=1e-5
    )


def test_damaged_pictures_are_named(tmp_path):
    whole = draw_bar(tmp_path / "whole.png").read_bytes()
    broken = tmp_path / "broken.png"
    for content in (b"", b"no picture", whole[:-30], whole[: len(whole) // 2], whole[:20]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.png: not a readable picture"):
            read_ink(broken)
    flipped = bytearray(whole)
    flipped[whole.index(b"IDAT") + 10] ^= 0xFF
    broken.write_bytes(flipped)
    with pytest.raises(DataError, match=r"broken\.png"):
        read_ink(broken)


def test_missing_and_blank_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.png: no such picture"):
        read_ink(tmp_path / "none.png")
    with pytest.raises(DataError, match="not a readable picture"):
        read_ink(tmp_path)
    Image.new("L", (9, 9), 200).save(tmp_path / "blank.png")
    with pytest.raises(DataError, match=r"blank\.png: the picture is blank"):
        read_ink(tmp_path / "blank.png")


def test_affine_depends_on_the_generator_alone():
    images = load_data("digits").train.images[:6]
    change = augmentation.Affine(shift=2, rotate=10, scale=0.1)
    one, same = (change(images, torch.Generator().manual_seed(3)) for _ in range(2))
    other = change(images, torch.Generator().manual_seed(4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_affine_of_nothing_is_nothing_and_a_shift_shifts():
    images = load_data("digits").train.images[:3]
    still = augmentation.Affine()(images, torch.Generator())
    torch.testing.assert_close(still, images, rtol=0, atol=1e-5)
    moved = augmentation.Affine(shift=6)(torch.full((50, 1, 32, 32), 0.3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, torch.full_like(moved, 0.3))  # no edge appears


def test_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="unknown augmentation 'afine': did you mean 'affine'"):
        augmentation.build([{"name": "afine"}])
    with pytest.raises(ValueError, match=r"augmentation 'affine'.*turn"):
        augmentation.build([{"name": "affine", "turn": 3}])
