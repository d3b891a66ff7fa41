"""Folders of images, laid out as train/CLASS/* and test/CLASS/*."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

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
        flip=True,
        train=_part(directory / "train", train, classes, image_size),
        test=_part(directory / "test", test, classes, image_size),
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


def _part(directory: Path, files: dict[str, list[Path]], classes: tuple[str, ...], image_size: int) -> Part:
    paths = [path for name in classes for path in files.get(name, ())]
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in files.get(name, ())])
    return Part(
        labels,
        (image_size, image_size, 3),
        _Images(paths, image_size),
        lambda: _fingerprint(directory, paths, classes, image_size),
    )


@dataclass(frozen=True)
class _Images:
    """Positions among `paths` to images, uint8 [M, size, size, 3]."""

    paths: Sequence[Path]
    size: int

    def __call__(self, positions: Tensor) -> Tensor:
        return _decode_all([self.paths[i] for i in positions.tolist()], self.size)


def _fingerprint(directory: Path, paths: Sequence[Path], classes: tuple[str, ...], image_size: int) -> str:
    """Of the files' names and sizes, without a look into them: there may be millions."""
    digest = hashlib.sha256(f"{image_size} {classes}\n".encode())
    for path in paths:
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _decode_all(paths: Sequence[Path], size: int) -> Tensor:
    """Images uint8 [N, size, size, 3]; Pillow decodes and resizes outside the interpreter's lock."""
    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more bytes than an array can have
        gib = -(-len(paths) * size * size * 3 // 2**30)
        raise UserError(f"{len(paths)} images of {size} x {size} pixels need {gib:,} GiB; use a smaller one") from None

    def place(index: int) -> None:
        images[index] = _decode(paths[index], size)

    # A DataLoader's workers are as many as the cores already.
    pool = ThreadPoolExecutor(cores() if get_worker_info() is None else 1)
    try:
        for _ in pool.map(place, range(len(paths))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
