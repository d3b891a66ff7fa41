"""What a labelled set of images is, before and after it is divided into training, validation and test."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset ready for training: three splits and the constants of its augmentation."""

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
    crop: bool
    """Whether augmentation "auto" crops."""
    flip: bool
    """Whether augmentation "auto" flips from left to right."""
    train: Split
    """What is trained on."""
    validation: Split | None
    """Held out of the training images; None where nothing was asked for."""
    test: Split
    """Never trained on, nor chosen by."""


@dataclass(frozen=True, eq=False)
class Part:
    """The whole training or test set of a source, its images not yet read or not yet chosen among."""

    labels: Tensor
    """int64 [N]."""
    read: Callable[[Tensor], Tensor]
    """Positions, int64 [M], ascending, to images, uint8 [M, H, W, C]."""

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> "Part":
        """The part whose images, uint8 [N, H, W, C], are in memory."""
        return cls(labels, lambda positions: images if len(positions) == len(images) else images[positions])


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
    crop: bool
    """As in `Dataset`."""
    flip: bool
    """As in `Dataset`."""
    train: Part
    """The whole training set."""
    test: Part
    """The whole test set."""
