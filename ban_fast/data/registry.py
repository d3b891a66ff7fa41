"""Datasets by name: `load` reads one and divides it, the same way for every run."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import OptionError, UserError, suggest
from . import digits, splits
from .dataset import Dataset, Part, Split


def names() -> list[str]:
    """Datasets that `load` knows by name; it also takes a folder of images."""
    return ["digits", "cifar10", "cifar100"]


def load(
    name: str,
    *,
    directory: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Dataset:
    if name not in names():
        raise UserError(f"unknown dataset {name!r}{suggest(name, names())}")
    if name != "digits":
        raise UserError(f"{name} is not there")
    source = digits.read()
    train, validation = _hold_out(source.train.labels, val_fraction)
    train = _limited(train, source.train.labels, limit_train)
    test = _limited(torch.arange(len(source.test.labels)), source.test.labels, limit_test)
    train_split = _split(source.train, train)
    mean, std = _moments(train_split.images) if source.mean is None or source.std is None else (source.mean, source.std)
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
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(-1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        variance = float(share @ (values - mean) ** 2)
        means.append(mean)
        stds.append(variance**0.5 or 1.0)
    return tuple(means), tuple(stds)
