"""Folders of images: the layout, the formats, and the pixels that come out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ban_fast import data
from ban_fast.data import folder
from ban_fast.errors import OptionError, UserError


def save(path: Path, size: tuple[int, int] = (40, 40), colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes, told apart by their colour; three training images and one test image each."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            save(root / "train" / name / f"{i}.png", colour=(100 * label, 50, i))
        save(root / "test" / name / "x.png", colour=(100 * label, 50, 9))
    return root


def test_classes_labels_and_pixels(pets: Path) -> None:
    d = data.load(str(pets))
    assert d.name == str(pets)
    assert d.classes == ("cat", "dog")
    assert d.train.images.shape == (6, 32, 32, 3)
    assert d.train.images.dtype == torch.uint8
    assert d.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert d.test.labels.tolist() == [0, 1]
    assert (d.padding, d.flip) == (4, True)
    for part, blue in ((d.train, (0, 1, 2, 0, 1, 2)), (d.test, (9, 9))):
        for image, label, b in zip(part.images, part.labels.tolist(), blue, strict=True):
            assert image.unique(dim=0).shape[0] == 1
            assert image[0, 0].tolist() == [100 * label, 50, b]


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save(tmp_path / part / "cat" / "x.png")
    with pytest.raises(UserError, match=r"has one class, cat; .* add another"):
        data.load(tmp_path)


def test_constants_are_those_of_the_images_trained_on(pets: Path) -> None:
    d = data.load(pets)
    pixels = d.train.images.double().view(-1, 3)
    # Exact counts; the bound is fp64's own.
    assert d.mean == pytest.approx(pixels.mean(0).tolist(), rel=1e-12)
    assert d.std[0] == pytest.approx(float(pixels[:, 0].std(correction=0)), rel=1e-12)
    assert d.std[1] == 1.0  # a channel without contrast is left at its scale
    held = data.load(pets, val_fraction=0.34)
    assert held.validation is not None
    assert held.mean == pytest.approx(held.train.images.double().view(-1, 3).mean(0).tolist(), rel=1e-12)


def test_constants_over_many_images() -> None:
    from ban_fast.data.registry import _moments

    images = torch.randint(0, 256, (2500, 3, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = _moments(images)
    pixels = images.double().view(-1, 3)
    assert mean == pytest.approx(pixels.mean(0).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(0, correction=0).tolist(), rel=1e-12)


def test_a_name_below_the_data_directory(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(data.load("pets", directory=pets.parent).train) == 6
    assert len(data.load("pets", directory=pets).train) == 6
    monkeypatch.setenv("BAN_FAST_DATA", str(pets.parent))
    assert len(data.load("pets").train) == 6


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, x * 0], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (200, 100), (33, 32), (7, 20), (32, 32)])
@pytest.mark.parametrize("target", [16, 32])
def test_shorter_side_is_resized_and_the_middle_kept(tmp_path: Path, size: tuple[int, int], target: int) -> None:
    path = tmp_path / "image.png"
    gradient(*size).save(path)
    got = torch.from_numpy(folder._decode(path, target).copy()).double()
    assert got.shape == (target, target, 3)
    # In the middle of the crop are the values of the middle of the image, and values rise by the image's own slope.
    # Bounds: one pixel of the original for rounding its size, and one value for rounding each pixel.
    short = min(size)
    for channel, (extent, values) in enumerate(((size[0], got.mean(0)), (size[1], got.mean(1)))):
        step = 255 / extent
        assert abs(float(values[:, channel].mean()) - 127.5) <= step + 1
        rise = float(values[-2, channel] - values[1, channel])
        assert abs(rise - (target - 3) * short / target * step) <= step + 2


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(path)
    # Point sampling would give 0 or 255.
    assert abs(folder._decode(path, 32).astype(float) - 127.5).max() <= 2


@pytest.mark.parametrize("target", [1, 8, 224])
def test_image_size(pets: Path, target: int) -> None:
    d = data.load(pets, image_size=target)
    assert d.train.images.shape == (6, target, target, 3)
    assert d.padding == min(4, target - 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm", "PNG"])
def test_formats(pets: Path, suffix: str) -> None:
    save(pets / "train" / "cat" / f"a.{suffix}", colour=(200, 100, 50))
    (pets / "train" / "cat" / f"a.{suffix}").rename(pets / "train" / "cat" / "0-first")
    image = data.load(pets).train.images[0]
    # The content says the format, not the name. Lossy formats and GIF's palette keep one colour to a few values.
    assert (image.double() - torch.tensor([200.0, 100, 50])).abs().max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    value = 255 if mode == "1" else 200
    if mode == "I;16":
        Image.fromarray(np.full((40, 40), value * 256 + 7, np.uint16)).save(path)
    else:
        Image.new("RGB", (40, 40), (value,) * 3).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    pixels = folder._decode(path, 32)
    assert pixels.shape == (32, 32, 3)
    # YCbCr's rounding moves a value by 1.
    assert abs(pixels.astype(int) - value).max() <= 1


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(path, transparency=bytes([0, 128]))
    assert folder._decode(path, 32)[5, 5].tolist() == [200, 100, 50]


def test_exif_orientation(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    image = gradient(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter right to view"
    image.save(path, exif=exif, quality=95)
    got = folder._decode(path, 32).astype(int)
    # Red rose to the right; turned right, it rises downward.
    assert got[-1, :, 0].mean() - got[0, :, 0].mean() > 200
    assert abs(got[:, -1, 0].mean() - got[:, 0, 0].mean()) < 20


def test_hidden_files_are_passed_over(pets: Path) -> None:
    (pets / "train" / ".DS_Store").write_bytes(b"x")
    (pets / "train" / "cat" / "._0.png").write_bytes(b"x")
    (pets / "train" / ".cache").mkdir()
    assert len(data.load(pets).train) == 6


def test_a_class_of_training_alone(pets: Path) -> None:
    save(pets / "train" / "bird" / "0.png")
    d = data.load(pets)
    assert d.classes == ("bird", "cat", "dog")
    assert d.test.labels.tolist() == [1, 2]


def test_a_class_of_testing_alone(pets: Path) -> None:
    save(pets / "test" / "bird" / "0.png")
    with pytest.raises(UserError, match=r"test/bird is a class that .*train hasn't"):
        data.load(pets)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_that_is_missing(pets: Path, part: str) -> None:
    (pets / part).rename(pets / "other")
    with pytest.raises(UserError, match=rf"no directory .*{part}; .* laid out as train/CLASS/\* and test/CLASS/\*"):
        data.load(pets)


def test_empty_directories(pets: Path) -> None:
    (pets / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"train/empty has no image"):
        data.load(pets)
    root = pets.parent / "bare"
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
    with pytest.raises(UserError, match=r"bare/train has no class"):
        data.load(root)


def test_images_beside_the_classes(pets: Path) -> None:
    path = save(pets / "train" / "stray.png")
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is not a directory"):
        data.load(pets)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "directory", "unreadable link"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_unreadable_image_is_named(pets: Path, part: str, damage: str) -> None:
    path = pets / part / "dog" / "bad.jpg"
    if damage == "text":
        path.write_text("not an image")
    elif damage == "empty":
        path.touch()
    elif damage == "cut":
        gradient(100, 100).save(path)
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "directory":
        path.mkdir()
    else:
        path.symlink_to(pets / "nowhere")
    with pytest.raises(UserError, match=rf"cannot read {re.escape(str(path))} as an image \(.+\); replace") as caught:
        data.load(pets)
    assert "\n" not in str(caught.value)


def test_only_the_images_asked_for_are_read(pets: Path) -> None:
    kept = data.load(pets, limit_train=2)
    paths = sorted((pets / "train").glob("*/*"))
    for i, path in enumerate(paths):
        if i not in kept.train.sample_ids.tolist():
            path.write_bytes(b"not read")
    again = data.load(pets, limit_train=2)
    assert again.train.labels.tolist() == [0, 1]
    assert torch.equal(again.train.images, kept.train.images)


def test_impossible_sizes(pets: Path) -> None:
    with pytest.raises(OptionError, match=r"data.image_size: must be at least 1 pixel, got 0"):
        data.load(pets, image_size=0)
    for size, gib in ((10_000_000, "1,676,381"), (2_000_000_000, "67,055,225,373"), (10**30, ""), (10**400, "")):
        with pytest.raises(UserError, match=rf"6 images of {size} x {size} pixels need {gib}.* GiB"):
            data.load(pets, image_size=size)


def test_a_folder_needs_no_preparation(pets: Path) -> None:
    with pytest.raises(UserError, match="pets is a folder of images, which needs no preparation"):
        data.prepare(str(pets))


def test_a_folder_that_was_moved(pets: Path, tmp_path: Path) -> None:
    """A run recorded its whole path: its last name is looked for in the directory that is named now, or is that."""
    recorded = str(pets)
    before = data.load(recorded)
    (tmp_path / "elsewhere").mkdir()
    moved = pets.rename(tmp_path / "elsewhere" / "pets")
    with pytest.raises(UserError, match="no directory"):
        data.load(recorded)
    for directory in (moved.parent, moved):
        assert torch.equal(data.load(recorded, directory=str(directory)).train.images, before.train.images)
