"""Loaders of what users bring: two tensors, or a DataLoader of their own."""

import functools
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import UserError
from .loaders import WHOLE, Batch, KeyedLoader, Shard


class TensorLoader(KeyedLoader):
    """Batches of a user's own tensors, which lie on `device` and are served in the order that (seed, epoch) gives.

    `x` [N, ...] has the shape that the network takes. Floating-point values are served as they are, cast to `dtype`;
    uint8 values stay uint8 in memory and are served divided by 255. `y` [N] holds integer labels from 0 on.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        num_classes: int | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """`num_classes`: labels from there on are an error; None: any label counts as a class."""
        x, y = _samples(x), _labels(y)
        _check_range(y, num_classes)
        if x.ndim == 0 or len(x) != len(y):
            raise UserError(f"samples and labels must be as many, got shapes {list(x.shape)} and {list(y.shape)}")
        device = torch.device(device)
        super().__init__(
            y,
            torch.arange(len(y)),
            batch_size=batch_size,
            seed=seed,
            device=device,
            shuffle=shuffle,
            drop_last=drop_last,
            shard=shard,
        )
        self.sample_shape = tuple(x.shape[1:])
        self._stored = x.to(device)
        self._dtype = dtype
        self._channels_last = channels_last

    def _images(self, order: Tensor, views: Tensor, parts: list[slice]) -> Generator[Tensor, None, None]:
        for part in parts:
            yield self.gather(order[part], views[part])

    def gather(self, order: Tensor, views: Tensor) -> Tensor:  # [B], [B] -> [B, ...]
        """The samples at these places: a batch, on the device alone."""
        return _served(self._stored.index_select(0, order), self._dtype, self._channels_last)


class WrappedDataLoader:
    """Batches of a user's DataLoader of (samples, labels), moved to `device`.

    Its order is its own affair, so it can be resumed by whole epochs alone; sample ids count up in the order served,
    and every view is 0. Values are treated as by `TensorLoader`.
    """

    exact_resume = False

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        num_classes: int | None = None,
    ) -> None:
        """`num_classes`: labels from there on are an error; None: any label counts as a class."""
        try:
            self.steps_per_epoch = len(loader)
        except TypeError:
            raise UserError("the DataLoader has no length; give one over a dataset that has") from None
        if self.steps_per_epoch == 0:
            raise UserError("the DataLoader has not one batch: too few samples for its batch_size with drop_last?")
        self.batch_size = loader.batch_size  # None of one with a batch_sampler
        self._loader = loader
        self._device = torch.device(device)
        self._channels_last = channels_last
        self._dtype = dtype
        self._num_classes = num_classes

    @functools.cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network takes it; found by drawing a batch, random state of torch unmoved."""
        with torch.random.fork_rng(devices=[]):
            item = next(iter(self._loader), None)
        if item is None:
            raise UserError(f"the DataLoader ended before its first batch; its length says {self.steps_per_epoch}")
        x, _ = _pair(item)
        return tuple(x.shape[1:])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one pass over the DataLoader, without the first `start`; a sampler's `set_epoch` is called."""
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        served = 0
        for step, item in enumerate(islice(self._loader, self.steps_per_epoch)):
            x, y = _pair(item)
            first, served = served, served + len(y)
            if step < start:
                continue
            x, y = _samples(x), _labels(y)
            if y.device.type == "cpu":  # on a GPU a check would wait for it in every step; the losses make do there
                _check_range(y, self._num_classes)
            if len(x) != len(y):
                raise UserError(f"samples and labels must be as many, got shapes {list(x.shape)} and {list(y.shape)}")
            if len(y) == 0:
                raise UserError("a batch of the DataLoader has no samples; leave such batches out")
            images = _served(x.to(self._device, non_blocking=True), self._dtype, self._channels_last)
            ids = torch.arange(first, served, device=self._device)
            yield Batch(images, y.to(self._device, non_blocking=True), ids, torch.zeros_like(ids))


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)):
        got = [type(part).__name__ for part in item] if isinstance(item, (tuple, list)) else type(item).__name__
        raise UserError(f"a batch of the DataLoader must be two tensors (samples, labels), got {got}")
    return item[0], item[1]


def _samples(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise UserError(f"samples must be a tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise UserError(f"samples must be floating-point or uint8, got {x.dtype}; use .float()")
    return x.detach()


def _labels(y: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise UserError(f"labels must be a tensor, got {type(y).__name__}")
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"labels must be one integer a sample, shape [N], got {y.dtype} of shape {list(y.shape)}")
    return y.long()


def _check_range(y: Tensor, num_classes: int | None) -> None:
    """Reads the labels on the host."""
    if len(y) == 0:
        return
    least, largest = int(y.min()), int(y.max())
    if least < 0 or (num_classes is not None and largest >= num_classes):
        classes = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
        raise UserError(f"labels must be {classes}, got {least if least < 0 else largest}")


def _served(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    x = x.to(torch.float32).div_(255).to(dtype) if x.dtype == torch.uint8 else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
