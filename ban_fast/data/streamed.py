"""Loaders of images that are not in memory: a DataLoader whose workers read files, and FFCV. Same batches, bit for bit.

What they stream is the images as stored, in the keyed order and ahead of the training step; crop, flip and
normalisation follow on the training device, as `MemoryLoader` does them.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing.util import get_temp_dir
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError, first_line
from .dataset import Split, StoredSplit
from .folder import cores
from .loaders import ImageLoader, MemoryLoader

_MOST_WORKERS = 16
"""Each takes a process's memory and two batches of shared memory."""
_LONGEST_PATH = 107 - len("/listener-12345678")
"""Bytes of a directory that can have multiprocessing's sockets in it: Linux has room for 107 of their whole path."""


def open_loader(split: Split | StoredSplit, **options: Any) -> "MemoryLoader | StreamedLoader":
    """The loader that a split's images are for; which one it is changes no bit of any batch.

    `options` are those of `ImageLoader`.
    """
    if isinstance(split, Split):
        return MemoryLoader(split, **options)
    return TorchLoader(split, **options) if split.beton is None else FFCVLoader(split, **options)


class StreamedLoader(ImageLoader[StoredSplit]):
    """Batches of images that come from somewhere as uint8; a subclass brings them."""

    def _open(self, split: StoredSplit) -> None:
        self._split = split
        self._rows = torch.arange(min(self._batch_size, len(split)), device=self._device)

    def _images(self, order: Tensor, views: Tensor, parts: list[slice]) -> Generator[Tensor, None, None]:
        ids = self._split.sample_ids[order.cpu()]
        with closing(self._stored([ids[part] for part in parts])) as batches:
            for part, stored in zip(parts, batches, strict=True):
                images = stored.to(self._device, non_blocking=True)
                yield self._show(images, self._rows[: len(images)], views[part])

    def _stored(self, batches: list[Tensor]) -> Generator[Tensor, None, None]:  # [B] each -> uint8 [B, H, W, C] each
        """The images of each batch of sample ids, on the CPU; pinned where the device is a GPU."""
        raise NotImplementedError


class TorchLoader(StreamedLoader):
    """Reads its images with a DataLoader's worker processes: for datasets larger than memory."""

    workers: int | None = None
    """Processes; None: as many as there are cores, a shard's share of them, at most 16. 0 reads in this process."""

    def _stored(self, batches: list[Tensor]) -> Generator[Tensor, None, None]:
        workers = self.workers
        if workers is None:
            workers = min(max(cores() // self.shard.beside, 1), _MOST_WORKERS)
        if workers:
            _check_sockets()
        loader: DataLoader[Tensor | UserError] = DataLoader(
            _Reading(self._split.read),
            sampler=[ids.numpy() for ids in batches],  # a tensor would travel as a file in shared memory
            batch_size=None,  # what the sampler gives is a batch already
            num_workers=min(workers, len(batches)),
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # or it draws from torch's own, and the run depends on the loader
        )
        try:
            for images in _started(loader):  # without a name, so that the workers end with the loop
                if isinstance(images, UserError):
                    raise images
                yield images
        except (RuntimeError, OSError, EOFError) as error:
            if "Caught" in str(error):  # an error of the reading itself, with its traceback
                raise
            raise UserError(
                f"a process that reads images failed: {first_line(error)}; these take memory, and shared memory for "
                "two batches each (/dev/shm, in containers --shm-size): free some, or use a smaller batch size"
            ) from error


class FFCVLoader(StreamedLoader):
    """Reads its images from a `.beton` file with FFCV."""

    def _stored(self, batches: list[Tensor]) -> Generator[Tensor, None, None]:
        assert self._split.beton is not None
        # FFCV cuts into batches of one size: those of a shard are of one, but for the last of an epoch.
        stream = self._split.beton.reader(len(batches[0])).stream(torch.cat(batches))
        with closing(stream):
            for slot in stream:
                # FFCV fills the slot anew when the next batch is asked for. On a CPU, what is shown is a copy by then;
                # the copy to a GPU may still be under way, and so is made from memory of its own.
                images = torch.from_numpy(slot)
                if self._device.type == "cuda":
                    images = torch.empty_like(images, pin_memory=True).copy_(images)
                yield images


class _Reading(Dataset["Tensor | UserError"]):
    """What a worker does: sample ids to images. A mistake travels as a value, or it would arrive as a traceback."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self._read = read

    def __getitem__(self, ids: NDArray[np.int64]) -> "Tensor | UserError":  # [B] -> uint8 [B, H, W, C]
        try:
            return self._read(torch.from_numpy(ids))
        except UserError as mistake:
            return mistake


_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _check_sockets() -> None:
    """UserError where no worker could hand over what it reads, and this process would wait for it forever."""
    place = get_temp_dir()
    if len(os.fsencode(place)) > _LONGEST_PATH:
        raise UserError(
            f"the path of {os.path.dirname(place)} is too long for the sockets of processes that read images: set "
            "TMPDIR to a shorter one, or use another loader"
        )


def _started(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The loader's iterator, whose workers have been started."""
    with _stop_signals_held():
        return iter(loader)


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Until the end of the block stop signals wait; processes that it starts never get them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole group of processes; the workers are needed until the training loop has saved."""
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
