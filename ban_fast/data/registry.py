"""Datasets by name: `load` reads one and divides it, the same way for every run; `prepare` downloads one."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OptionError, UserError, suggest
from . import cifar, digits, download, folder, splits
from .dataset import Dataset, Part, Source, Split

_FOLDER_IMAGE_SIZE = 32
_COUNTED_AT_ONCE = 1024
"""Images; torch.bincount takes 8 bytes for every byte that it counts."""


def names() -> list[str]:
    """Datasets that `load` knows by name; it also takes a folder of images."""
    return ["digits", *cifar.CIFAR]


def load(
    name: str | Path,
    *,
    directory: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Dataset:
    """A dataset in memory, divided the same way for every run, whatever its seed.

    Args:
        name: one of `names()`, or a folder of images laid out as train/CLASS/* and test/CLASS/*, as a path or as a
            name below `directory`.
        directory: the dataset's own directory or its parent; None: $BAN_FAST_DATA, else ~/.cache/ban_fast. The digits
            come with the package and need none.
        image_size: side in pixels that a folder's images are resized to, 32 if None. Other datasets have their own.
        val_fraction: share of the training images held out as `validation`, in [0, 1), the same share of each class.
        limit_train: keep this many of the training images that are left after that, as many of each class as of any
            other; None, or more than there are: all.
        limit_test: the same for the test images.

    Raises:
        UserError: for whatever a user can mend: unknown name, dataset not there, damaged file, impossible value.
    """
    name = str(name)
    for option, limit in (("data.limit_train", limit_train), ("data.limit_test", limit_test)):
        if limit is not None and limit < 1:
            raise OptionError(option, f"must be at least 1, got {limit}")
    source = _source(name, _root(directory), image_size)
    train, validation = _hold_out(source.train.labels, val_fraction)
    train_split = _split(source.train, _limited(train, source.train.labels, limit_train))
    test = _limited(torch.arange(len(source.test.labels)), source.test.labels, limit_test)
    mean, std = source.mean, source.std
    if mean is None or std is None:
        mean, std = _moments(train_split.images)
    return Dataset(
        name=name,
        classes=source.classes,
        mean=mean,
        std=std,
        padding=source.padding,
        crop=source.crop,
        flip=source.flip,
        train=train_split,
        validation=None if validation is None else _split(source.train, validation),
        test=_split(source.test, test),
    )


def prepare(name: str, directory: str | Path | None = None, *, progress: download.Progress | None = None) -> Path:
    """Download, verify and unpack a dataset; what is there already is read through and kept. Returns where it is.

    Args:
        name: "cifar10" or "cifar100". The digits come with the package: nothing to do, and their file is returned.
        directory: the dataset's own directory or its parent; None: as for `load`.
        progress: called with the bytes that have come and the bytes that will (None: the server doesn't say).

    Raises:
        UserError: unknown name, no network, wrong sum, full disk; nothing half-written stays behind.
    """
    if name in cifar.CIFAR:
        return download.fetch(cifar.CIFAR[name], _root(directory), progress)
    if name == "digits":
        return digits.FILE
    if _folder(name, _root(directory)) is not None:
        raise UserError(f"{name} is a folder of images, which needs no preparation; only {', '.join(cifar.CIFAR)} do")
    raise UserError(f"unknown dataset {name!r}{suggest(name, names())}")


def _root(directory: str | Path | None) -> Path:
    return Path(directory or os.environ.get("BAN_FAST_DATA") or "~/.cache/ban_fast").expanduser()


def _source(name: str, root: Path, image_size: int | None) -> Source:
    if name in names():
        source = digits.read() if name == "digits" else _cifar(name, root)
        own = 8 if name == "digits" else 32
        if image_size not in (None, own):
            raise OptionError(
                "data.image_size", f"{name} has images of {own} pixels, got {image_size}; it resizes folders"
            )
        return source
    path = _folder(name, root)
    if path is None:
        if os.sep in name or name.startswith(("~", ".")):
            raise UserError(
                f"no directory {name}; name a folder laid out as {folder.LAYOUT}, or {' or '.join(names())}"
            )
        raise UserError(f"unknown dataset {name!r}{suggest(name, names())}")
    if not folder.is_folder(path):
        for published in cifar.CIFAR.values():
            if cifar.locate(published, path) is not None:
                raise UserError(
                    f"{path} holds {published.name}; give the name {published.name!r} and this as --data-dir"
                )
    return folder.read(path, _FOLDER_IMAGE_SIZE if image_size is None else image_size)


def _cifar(name: str, root: Path) -> Source:
    published = cifar.CIFAR[name]
    directory = cifar.locate(published, root)
    if directory is None:
        what = (
            f"no {published.directory} in it" if root.is_dir() else "not a directory" if root.exists() else "not there"
        )
        raise UserError(f"{name} is not in {root} ({what}); get it with `ban-fast prepare {name} --data-dir {root}`")
    return cifar.read(published, directory)


def _folder(name: str, root: Path) -> Path | None:
    """The directory that `name` means: a path, or a name below the data directory, or that directory itself."""
    path = Path(name).expanduser()
    candidates = [path, root / path, *([root] if root.name == name else [])]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _hold_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor | None]:
    """Positions to train on and to validate on."""
    positions = torch.arange(len(labels))
    if fraction == 0:
        return positions, None
    if not 0 < fraction < 1:
        raise OptionError("data.val_fraction", f"must be in [0, 1), got {fraction}")
    count = round(len(labels) * fraction)
    if not 0 < count < len(labels):
        kept = "no image to train on" if count else "no image to validate on"
        raise OptionError("data.val_fraction", f"{fraction} of {len(labels)} training images leaves {kept}")
    held = splits.proportional(labels, count)
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[held] = False
    return positions[is_train], held


def _limited(positions: Tensor, labels: Tensor, limit: int | None) -> Tensor:
    if limit is None or limit >= len(positions):
        return positions
    return positions[splits.even(labels[positions], limit)]


def _split(part: Part, positions: Tensor) -> Split:
    return Split(part.read(positions), part.labels[positions], positions)


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, C], from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(-1):
        counts = torch.zeros(256, dtype=torch.int64)
        for start in range(0, len(channel), _COUNTED_AT_ONCE):
            counts += torch.bincount(channel[start : start + _COUNTED_AT_ONCE].reshape(-1), minlength=256)
        share = counts.double() / channel.numel()
        mean = float(share @ values)
        variance = float(share @ (values - mean) ** 2)
        means.append(mean)
        stds.append(variance**0.5 or 1.0)
    return tuple(means), tuple(stds)
