"""Datasets by name: `load` reads one and divides it, the same way for every run; `prepare` downloads one."""

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OptionError, UserError, suggest
from . import beton, cifar, digits, download, folder, ptb, splits
from .beton import Beton
from .dataset import AnySplit, Dataset, Part, Source, Split, StoredSplit
from .places import data_directory, directory_of
from .scratch import remove_abandoned

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
    source, _ = _source(str(name), directory, image_size)
    return _divided(str(name), source, _split, val_fraction, limit_train, limit_test)


def load_stored(
    name: str | Path,
    *,
    ffcv: bool = False,
    directory: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.0,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Dataset[StoredSplit]:
    """The same dataset, divided the same way, its images left where they are until a loader asks for them.

    With `ffcv`, they are those of the `.beton` files that `prepare` writes; the dataset's own files must be there too,
    for the labels, and to tell that the `.beton` is of them. Where no constants are published (folders), every image
    that is trained on is read once to measure them.

    Raises:
        UserError: as `load`; FFCV isn't installed; a `.beton` that isn't there, is cut short, or of other images.
    """
    if ffcv and (reason := beton.missing()) is not None:
        raise OptionError("data.loader", f"FFCV is {reason}")
    source, stem = _source(str(name), directory, image_size)
    command = _command(str(name), directory, image_size)
    files: dict[str, Beton | None] = {"train": None, "test": None}
    if ffcv:
        files = {part: Beton(*_beton(source, stem, part), command) for part in files}

    def split(part: Part, positions: Tensor) -> StoredSplit:
        file = files["train" if part is source.train else "test"]
        read = part.read if file is None else file.read
        return StoredSplit(read, part.shape, part.labels[positions], positions, file)

    return _divided(str(name), source, split, val_fraction, limit_train, limit_test)


def _divided(
    name: str,
    source: Source,
    split: Callable[[Part, Tensor], AnySplit],
    val_fraction: float,
    limit_train: int | None,
    limit_test: int | None,
) -> Dataset[AnySplit]:
    for option, limit in (("data.limit_train", limit_train), ("data.limit_test", limit_test)):
        if limit is not None and limit < 1:
            raise OptionError(option, f"must be at least 1, got {limit}")
    train, validation = _hold_out(source.train.labels, val_fraction)
    train_split = split(source.train, _limited(train, source.train.labels, limit_train))
    test = _limited(torch.arange(len(source.test.labels)), source.test.labels, limit_test)
    mean, std = source.mean, source.std
    if mean is None or std is None:
        mean, std = _moments(train_split.chunks(_COUNTED_AT_ONCE))
    return Dataset(
        name=name,
        classes=source.classes,
        mean=mean,
        std=std,
        padding=source.padding,
        flip=source.flip,
        train=train_split,
        validation=None if validation is None else split(source.train, validation),
        test=split(source.test, test),
    )


def prepare(name: str, directory: str | Path | None = None, *, progress: download.Progress | None = None) -> Path:
    """Download, verify and unpack a dataset; what is there already is read through and kept. Returns where it is.

    Args:
        name: "cifar10", "cifar100" or "ptb". The digits come with the package: their file is returned.
        directory: the dataset's own directory or its parent; None: as for `load`.
        progress: called with the bytes that have come and the bytes that will (None: the server doesn't say).

    Raises:
        UserError: unknown name, no network, wrong sum, full disk; nothing half-written stays behind.
    """
    if name in cifar.CIFAR:
        return download.fetch(cifar.CIFAR[name], data_directory(directory), progress)
    if name == "ptb":
        return ptb.prepare_ptb(directory, progress)
    if name == "digits":
        return digits.FILE
    if directory_of(name, data_directory(directory)) is not None:
        raise UserError(
            f"{name} is a folder of images, which needs no preparation but FFCV's (--format ffcv); "
            f"only {', '.join(cifar.CIFAR)} and ptb do"
        )
    raise _unknown(name)


def prepare_ffcv(
    name: str,
    directory: str | Path | None = None,
    *,
    image_size: int | None = None,
    progress: download.Progress | None = None,
) -> list[Path]:
    """Prepare a dataset, then write FFCV's files of it: `NAME-train-SIZE.beton` and `NAME-test-SIZE.beton`.

    They lie in the dataset's own directory, the digits' in `directory`, as do those of a folder that is not below it,
    and hold raw pixels: 3 KB a CIFAR image, 150 KB one of 224 x 224. Files that are whole and of these images are kept.

    Args:
        name: as for `load`, a folder of images too.
        directory: as for `load`.
        image_size: as for `load`; each size has its own files.
        progress: called with the bytes that have come, been written or read through, and all (None: not known).

    Raises:
        UserError: as `load` and `prepare`; nothing half-written stays behind.
    """
    if ptb.is_text(name, directory):
        raise UserError(f"{name} is a text, and FFCV's files are of images: leave out --format ffcv")
    if name in cifar.CIFAR:
        prepare(name, directory, progress=progress)
    source, stem = _source(name, directory, image_size)
    return [_written(source, stem, part, progress) for part in ("train", "test")]


def _written(source: Source, stem: Path, part: str, progress: download.Progress | None) -> Path:
    path, images, what = _beton(source, stem, part)
    remove_abandoned(path.parent)
    try:
        Beton(path, images, what, "", trust_stamp=False, progress=progress)
    except UserError:
        path.parent.mkdir(parents=True, exist_ok=True)
        beton.write(path, images, what, progress)
    return path


def _beton(source: Source, stem: Path, part: str) -> tuple[Path, Part, str]:
    """The file of FFCV's for a part, that part, and what the file says it is of."""
    images = source.train if part == "train" else source.test
    height, width, _ = images.shape
    return stem.with_name(f"{stem.name}-{part}-{height}.beton"), images, f"{stem.name} {part} {height} x {width}"


def _command(name: str, directory: str | Path | None, image_size: int | None) -> str:
    """What writes FFCV's files."""
    options = {"--data-dir": directory, "--image-size": image_size}
    given = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    return shlex.join(["ban-fast", "prepare", name, "--format", "ffcv", *given])


def _source(name: str, directory: str | Path | None, image_size: int | None) -> tuple[Source, Path]:
    """The dataset, and what the paths of the files made from it begin with."""
    root = data_directory(directory)
    if name in names():
        source, stem = (digits.read(), root / name) if name == "digits" else _cifar(name, root)
        own = 8 if name == "digits" else 32
        if image_size not in (None, own):
            raise OptionError(
                "data.image_size", f"{name} has images of {own} pixels, got {image_size}; it resizes folders"
            )
        return source, stem
    path = directory_of(name, root)
    if path is None:
        if os.sep in name or name.startswith(("~", ".")):
            raise UserError(
                f"no directory {name}; name a folder laid out as {folder.LAYOUT}, or {' or '.join(names())}"
            )
        raise _unknown(name)
    if not folder.is_folder(path):
        for published in cifar.CIFAR.values():
            if cifar.locate(published, path) is not None:
                raise UserError(
                    f"{path} holds {published.name}; give the name {published.name!r} and this as --data-dir"
                )
    source = folder.read(path, _FOLDER_IMAGE_SIZE if image_size is None else image_size)
    own_place = directory is None or path.resolve().is_relative_to(root.resolve())
    return source, (path if own_place else root) / path.resolve().name


def _unknown(name: str) -> UserError:
    return UserError(f"unknown dataset {name!r}{suggest(name, [*names(), 'ptb'])}")


def _cifar(name: str, root: Path) -> tuple[Source, Path]:
    published = cifar.CIFAR[name]
    directory = cifar.locate(published, root)
    if directory is None:
        if root.exists() and not root.is_dir():
            raise UserError(f"{name} is not in {root} (not a directory); name the one that holds {published.directory}")
        what = f"no {published.directory} in it" if root.is_dir() else "not there"
        raise UserError(f"{name} is not in {root} ({what}); get it with `ban-fast prepare {name} --data-dir {root}`")
    return cifar.read(published, directory), directory / name


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


def _moments(chunks: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, C], in parts, from exact counts of 256 values."""
    values = torch.arange(256, dtype=torch.float64)
    counts: list[Tensor] = []  # [256] a channel
    for images in chunks:
        counted = [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(-1)]
        counts = [a + b for a, b in zip(counts, counted, strict=True)] if counts else counted
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = float(share @ values)
        variance = float(share @ (values - mean) ** 2)
        means.append(mean)
        stds.append(variance**0.5 or 1.0)
    return tuple(means), tuple(stds)
