"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read from the published 'python version' directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import unpickle
from .dataset import Part, Source

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of each channel, in units of 0..255: the constants of the Wide ResNet authors, who use them on both datasets."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a dataset is published and how its directory is laid out."""

    name: str
    directory: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    label_names: str
    num_classes: int
    url: str
    md5: str

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.meta)


CIFAR = {
    "cifar10": Published(
        name="cifar10",
        directory="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        label_names="label_names",
        num_classes=10,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": Published(
        name="cifar100",
        directory="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        label_names="fine_label_names",
        num_classes=100,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
}
"""By the name that `load` knows them by."""


def locate(published: Published, directory: Path) -> Path | None:
    """The dataset's own directory, which `directory` is or contains; None where neither is so."""
    if (directory / published.directory).is_dir():
        return directory / published.directory
    # An image folder has directories of the names that CIFAR-100 gives to files.
    if any((directory / file).is_file() for file in published.files):
        return directory
    return None


def read(published: Published, directory: Path) -> Source:
    """The dataset in its own directory. The order of the images is that of the files, whatever it is.

    Raises:
        UserError: naming the file that is missing, damaged, refused, or not of this dataset.
    """
    missing = [file for file in published.files if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {', '.join(missing)}; complete it, or remove it and run "
            f"`ban-fast prepare {published.name} --data-dir {directory.parent}`"
        )
    train = [_read_batch(published, directory / file) for file in published.train]
    images = torch.cat([images for images, _ in train]) if len(train) > 1 else train[0][0]
    return Source(
        classes=_read_classes(published, directory / published.meta),
        mean=MEAN,
        std=STD,
        padding=4,
        flip=True,
        train=Part.of(images, torch.cat([labels for _, labels in train])),
        test=Part.of(*_read_batch(published, directory / published.test)),
    )


def _read_batch(published: Published, path: Path) -> tuple[Tensor, Tensor]:
    """One file: images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    content = _read_dict(path)
    data = content.get("data")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{path}: 'data' must be uint8 [N, 3072], got {got}; this is not a file of {published.name}")
    labels = content.get(published.labels)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise UserError(f"{path}: no list of integers {published.labels!r}; this is not a file of {published.name}")
    if not 0 < len(labels) == len(data):
        raise UserError(f"{path}: {len(data)} images and {len(labels)} labels; replace the file")
    if not 0 <= min(labels) <= max(labels) < published.num_classes:
        wrong = next(label for label in labels if not 0 <= label < published.num_classes)
        raise UserError(f"{path}: label {wrong} is not in 0..{published.num_classes - 1}; replace the file")
    # Published channel by channel: 1024 red values, then green, then blue.
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return torch.from_numpy(images), torch.tensor(labels)


def _read_classes(published: Published, path: Path) -> tuple[str, ...]:
    names = _read_dict(path).get(published.label_names)
    if not (isinstance(names, list) and len(names) == published.num_classes):
        raise UserError(f"{path}: no list of {published.num_classes} names {published.label_names!r}; replace the file")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def _read_dict(path: Path) -> dict[str, Any]:
    content = unpickle.read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a dictionary, got {type(content).__name__}; replace the file")
    # Byte strings where Python 2 wrote the file, as it did the published ones.
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
