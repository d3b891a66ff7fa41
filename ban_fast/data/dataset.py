"""What a labelled set of images is, before and after it is divided into training, validation and test."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from . import hashing

if TYPE_CHECKING:
    from .beton import Beton

Shape = tuple[int, int, int]
"""Of an image: height, width, channels."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels, as they lie in memory."""

    images: Tensor
    """uint8 [N, H, W, C]."""
    labels: Tensor
    """int64 [N], in 0..len(classes)-1."""
    sample_ids: Tensor
    """int64 [N]: each image's position in the whole training (or test) set, whatever subset this is."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> Shape:
        """Of each image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time: uint8 [n, H, W, C]."""
        for first in range(0, len(self), size):
            yield self.images[first : first + size]


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """Images with their labels, the images left where they are stored until they are asked for."""

    read: Callable[[Tensor], Tensor]
    """Sample ids, int64 [M], in any order, to images, uint8 [M, H, W, C]."""
    shape: Shape
    """Of each image."""
    labels: Tensor
    """int64 [N], in 0..len(classes)-1."""
    sample_ids: Tensor
    """int64 [N]: each image's position in the whole training (or test) set, whatever subset this is."""
    beton: "Beton | None" = None
    """The file of FFCV's that holds the images; None: files of their own."""

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in order, read `size` at a time: uint8 [n, H, W, C]."""
        for first in range(0, len(self), size):
            yield self.read(self.sample_ids[first : first + size])


AnySplit = TypeVar("AnySplit", Split, StoredSplit, default=Split)


@dataclass(frozen=True, eq=False)
class Dataset(Generic[AnySplit]):
    """A dataset ready for training: three splits, in memory or stored, and the constants of its augmentation."""

    name: str
    """As given to `load`."""
    classes: tuple[str, ...]
    """Name of each label."""
    mean: tuple[float, ...]
    """Of each channel, in units of 0..255."""
    std: tuple[float, ...]
    """Of each channel, in units of 0..255."""
    padding: int
    """Pixels that a random crop may move an image by, in each direction."""
    flip: bool
    """Whether augmentation "auto" flips from left to right."""
    train: AnySplit
    """What is trained on."""
    validation: AnySplit | None
    """Held out of the training images; None where nothing was asked for."""
    test: AnySplit
    """Never trained on, nor chosen by."""


@dataclass(frozen=True, eq=False)
class Part:
    """The whole training or test set of a source, its images not yet read or not yet chosen among."""

    labels: Tensor
    """int64 [N]."""
    shape: Shape
    """Of each image."""
    read: Callable[[Tensor], Tensor]
    """Positions, int64 [M], in any order, to images, uint8 [M, H, W, C]; can be pickled."""
    fingerprint: Callable[[], str]
    """A hash that tells these images and labels from others."""

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> "Part":
        """The part whose images, uint8 [N, H, W, C], are in memory."""
        _, height, width, channels = images.shape
        return cls(labels, (height, width, channels), _Rows(images), lambda: _hash(images, labels))


@dataclass(frozen=True, eq=False)
class _Rows:
    images: Tensor

    def __call__(self, positions: Tensor) -> Tensor:
        whole = len(positions) == len(self.images) and torch.equal(positions, torch.arange(len(positions)))
        return self.images if whole else self.images[positions]


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    hashing.add(digest, *tensors)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset as it is published, before validation images are held out and limits apply."""

    classes: tuple[str, ...]
    """Name of each label."""
    mean: tuple[float, ...] | None
    """Of each channel, in units of 0..255; None: measured on the images that are trained on."""
    std: tuple[float, ...] | None
    """Likewise."""
    padding: int
    """As in `Dataset`."""
    flip: bool
    """As in `Dataset`."""
    train: Part
    """The whole training set."""
    test: Part
    """The whole test set."""
