"""Folders of images, laid out as train/CLASS/* and test/CLASS/*."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import OptionError, UserError
from .dataset import Part, Source

if TYPE_CHECKING:
    from PIL import Image

LAYOUT = "train/CLASS/* and test/CLASS/*"
"""As messages say it."""

_PADDING = 4


def is_folder(directory: Path) -> bool:
    """Whether `directory` has the layout, as far as its first level shows."""
    return (directory / "train").is_dir() and (directory / "test").is_dir()


def read(directory: Path, image_size: int) -> Source:
    """The images of a folder as RGB of `image_size` x `image_size` pixels, read when asked for.

    Any format that Pillow reads. An image's shorter side is resized to `image_size` (bilinear, antialiased) and the
    middle cut out; its EXIF orientation is heeded. Classes are the names of the directories, sorted. Names that begin
    with a dot are passed over. Mean and standard deviation are those of the images that are trained on.

    Raises:
        UserError: another layout, an empty class, a class to test that isn't trained on; and, when images are read,
            naming the file that isn't one.
    """
    if image_size < 1:
        raise OptionError("data.image_size", f"must be at least 1 pixel, got {image_size}")
    train, test = _files(directory / "train"), _files(directory / "test")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise UserError(f"{directory / 'test' / unknown[0]} is a class that {directory / 'train'} hasn't; add it there")
    classes = tuple(sorted(train))
    if len(classes) < 2:
        raise UserError(f"{directory / 'train'} has one class, {classes[0]}; nothing to tell it from: add another")
    return Source(
        classes=classes,
        mean=None,
        std=None,
        padding=min(_PADDING, image_size - 1),
        crop=True,
        flip=True,
        train=_part(train, classes, image_size),
        test=_part(test, classes, image_size),
    )


def _files(part: Path) -> dict[str, list[Path]]:
    """The files of each class."""
    if not part.is_dir():
        raise UserError(f"no directory {part}; a folder of images is laid out as {LAYOUT}")
    files = {}
    for directory in _entries(part):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; a folder of images is laid out as {LAYOUT}")
        files[directory.name] = _entries(directory)
        if not files[directory.name]:
            raise UserError(f"{directory} has no image; add some or remove it")
    if not files:
        raise UserError(f"{part} has no class; a folder of images is laid out as {LAYOUT}")
    return files


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from None


def _part(files: dict[str, list[Path]], classes: tuple[str, ...], image_size: int) -> Part:
    paths = [path for name in classes for path in files.get(name, ())]
    labels = [label for label, name in enumerate(classes) for _ in files.get(name, ())]
    return Part(torch.tensor(labels), lambda positions: _decode_all([paths[i] for i in positions.tolist()], image_size))


def _decode_all(paths: Sequence[Path], size: int) -> Tensor:
    """Images uint8 [N, size, size, 3]; Pillow decodes and resizes outside the interpreter's lock."""
    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError:
        gib = len(paths) * size * size * 3 / 2**30
        raise UserError(
            f"{len(paths)} images of {size} x {size} pixels need {gib:.1f} GiB; use a smaller one"
        ) from None

    def place(index: int) -> None:
        images[index] = _decode(paths[index], size)

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        for _ in pool.map(place, range(len(paths))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def _decode(path: Path, size: int) -> NDArray[np.uint8]:  # -> [size, size, 3]
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = _rgb(ImageOps.exif_transpose(image))
    # Damaged files surface as nearly any exception, from as many decoders.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read {path} as an image ({reason}); replace or remove it") from None
    width, height = upright.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    resized = upright.resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits a pixel, which Pillow's own conversion would clip at 255.
        values: NDArray[Any] = np.clip(np.asarray(image) >> 8, 0, 255)
        image = Image.fromarray(values.astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # its colours; Pillow warns where a palette's are asked for directly
    return image.convert("RGB")
