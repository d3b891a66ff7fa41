"""Loaders: what the training loop takes batches from.

All of them serve an epoch with `epoch(number, start)`. On every `KeyedLoader` its order and its views are functions of
(seed, epoch, sample id), so any epoch can be had again from any batch on, and each of them serves the same bits. With a
`shard` it serves that part of each batch: all shards together are the batches of one process.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Generic, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from . import keyed
from .augment import Augmentation
from .dataset import AnySplit, Split
from .viewer import viewer


class Batch(NamedTuple):
    """One step's samples, all on the loader's device."""

    images: Tensor
    """What the network takes: [B, C, H, W], normalised; [B, ...] of a user's own."""
    labels: Tensor
    """int64 [B]."""
    sample_ids: Tensor
    """int64 [B]: which samples these are."""
    views: Tensor
    """int64 [B]: which of its views each sample shows; 0 where there is but one."""


class Shard(NamedTuple):
    """One of several parts that every batch is cut into: that of one process, where several train together.

    The order of a batch is keyed by sample ids, so they alone say which sample is whose.
    """

    number: int = 0
    of: int = 1
    beside: int = 1
    """Processes on this machine that load a part."""

    def cut(self, batch: slice) -> slice:
        """This part of a batch; the parts of one differ by a sample at most."""
        size = batch.stop - batch.start
        first, last = (batch.start + number * size // self.of for number in (self.number, self.number + 1))
        return slice(first, last)


WHOLE = Shard()


class Loader(Protocol):
    """What the training loop needs of a loader."""

    @property
    def exact_resume(self) -> bool:
        """Whether `epoch(e, start)` is exactly the tail of `epoch(e)`."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network takes it: (C, H, W) for images."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        ...


class Epoch(NamedTuple):
    """What an epoch serves of all samples, in its order; batches are slices of it. On the loader's device."""

    order: Tensor
    """int64 [N]: places of the samples in what is stored."""
    labels: Tensor
    sample_ids: Tensor
    views: Tensor


class KeyedLoader:
    """Order, labels, ids and views of an epoch's batches, all keyed; a subclass makes their images."""

    exact_resume = True

    def __init__(
        self,
        labels: Tensor,
        sample_ids: Tensor,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        shuffle: bool,
        drop_last: bool,
        shard: Shard = WHOLE,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if len(labels) == 0:
            raise UserError("there is not one sample to load")
        self._labels = labels.to(device)
        self._sample_ids = sample_ids.to(device)
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._shuffle = shuffle
        self._drop_last = drop_last and len(labels) >= batch_size
        self.shard = shard

    def __len__(self) -> int:
        """Samples, not batches."""
        return len(self._labels)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; fewer samples than one batch are one batch of all, `drop_last` or not."""
        whole, rest = divmod(len(self._labels), self._batch_size)
        return whole + (1 if rest and not self._drop_last else 0)

    @property
    def whole_batch(self) -> int:
        """Samples of a batch, all shards' together; the last of an epoch may have fewer, without `drop_last`."""
        return min(self._batch_size, len(self._labels))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `epoch` from number `start` on: the same as the whole epoch's, without the work."""
        steps = self.steps_per_epoch
        if epoch < 0 or not 0 <= start <= steps:
            raise ValueError(f"epoch must be at least 0 and start in 0..{steps}, got {epoch} and {start}")
        return self._batches(epoch, range(start, steps))

    def shown(self, epoch: int, steps: int) -> tuple[Tensor, Tensor]:
        """Ids and views, int64 [M] each, of the samples in the first `steps` batches of an epoch; no image is made."""
        ids, views = self._sample_ids, self._views(epoch)
        if steps * self._batch_size < len(ids):
            order = self._order(epoch)[: steps * self._batch_size]
            ids, views = ids[order], views[order]
        return ids, views

    def _batches(self, epoch: int, steps: range) -> Iterator[Batch]:
        if not steps:
            return
        order, labels, ids, views = self.plan(epoch)
        size, count = self._batch_size, len(order)
        parts = [self.shard.cut(slice(step * size, min((step + 1) * size, count))) for step in steps]
        # Closed at once where an epoch is left early: what reads ahead has threads or processes to end.
        with closing(self._images(order, views, parts)) as batches:
            for part, images in zip(parts, batches, strict=True):
                yield Batch(images, labels[part], ids[part], views[part])

    def plan(self, epoch: int) -> Epoch:
        """Which samples an epoch serves, and how: some 30 small operations, which each batch would pay otherwise."""
        order = self._order(epoch)
        return Epoch(order, self._labels[order], self._sample_ids[order], self._views(epoch)[order])

    def _order(self, epoch: int) -> Tensor:  # -> [N]
        if self._shuffle:
            return keyed.order(self._seed, epoch, self._sample_ids)
        return torch.arange(len(self._labels), device=self._device)

    def _views(self, epoch: int) -> Tensor:  # -> [N]
        return torch.zeros_like(self._sample_ids)

    def _images(
        self, order: Tensor, views: Tensor, parts: list[slice]
    ) -> Generator[Tensor, None, None]:  # [N], [N] -> [B, ...] each
        """The images of the batches `order[part]` in the views `views[part]`, for every part."""
        raise NotImplementedError


class ImageLoader(KeyedLoader, Generic[AnySplit]):
    """What the loaders of a split of images share: its augmentation and its normalisation.

    Equivalent to padding, cropping and flipping each image by itself, in the order that (seed, epoch) gives; neither
    batch size nor device nor where the images are kept changes a bit of what a sample looks like in an epoch. For
    evaluation: `shuffle=False, drop_last=False` and no augmentation.
    """

    def __init__(
        self,
        split: AnySplit,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        device: str | torch.device = "cpu",
        augmentation: Augmentation | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        shard: Shard = WHOLE,
    ) -> None:
        device = torch.device(device)
        super().__init__(
            split.labels,
            split.sample_ids,
            batch_size=batch_size,
            seed=seed,
            device=device,
            shuffle=shuffle,
            drop_last=drop_last,
            shard=shard,
        )
        height, width, channels = split.shape
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean and std must have {channels} values each, got {len(mean)} and {len(std)}")
        self.augmentation = augmentation
        self.sample_shape = (channels, height, width)
        self._show = viewer(
            augmentation, split.shape, mean, std, device=device, dtype=dtype, channels_last=channels_last
        )
        self._open(split)

    def _open(self, split: AnySplit) -> None:
        """Called once, with everything else in place: keep what the images will come from."""
        raise NotImplementedError

    def _views(self, epoch: int) -> Tensor:
        if self.augmentation is None:
            return super()._views(epoch)
        hashed = keyed.bits(self._seed, epoch, self._sample_ids, keyed.VIEW)
        return keyed.below(hashed, self.augmentation.views)


class MemoryLoader(ImageLoader[Split]):
    """Batches of a `Split` whose uint8 images lie on `device`, cut, normalised and cast there."""

    def _open(self, split: Split) -> None:
        self._stored = split.images.to(self._device)

    def _images(self, order: Tensor, views: Tensor, parts: list[slice]) -> Generator[Tensor, None, None]:
        for part in parts:
            yield self.gather(order[part], views[part])

    def gather(self, order: Tensor, views: Tensor) -> Tensor:  # [B], [B] -> [B, C, H, W]
        """Views of the images at these places: a batch, on the device alone."""
        return self._show(self._stored, order, views)
