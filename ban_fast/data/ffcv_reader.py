"""FFCV's reading of a `.beton` file, in an order of ours. Imported where FFCV is asked for: it takes seconds.

FFCV's own loop (`EpochIterator.run`) sets torch's number of threads while training uses it, hangs for ever where it
fails, and ends, when an epoch is left early, half a second later at best; so its pipeline runs in a loop of ours.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from numpy.typing import NDArray
from torch import Tensor

_AHEAD = 3
"""Batches that wait, decoded; FFCV's own default."""


class Reader:
    """The images of a file in any order, in batches of one size."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self._loader = Loader(
            str(path),
            batch_size,
            # One thread, beside the one that trains: it copies bytes. More would bring a pool of threads that allows
            # one epoch at a time and ends forked processes.
            num_workers=1,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            batches_ahead=_AHEAD,
            pipelines={"image": [NDArrayDecoder()], "label": None},
        )

    def stream(self, ids: Tensor) -> Generator[NDArray[np.uint8], None, None]:
        """The samples `ids`, int64 [N], batch by batch: uint8 [B, H, W, C], each good until the next is asked for."""
        epoch = _Epoch(self._loader, ids.numpy())
        try:
            yield from epoch.batches()
        finally:
            epoch.stop()


class _Epoch(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """One pass, in a thread that ends with it."""

    def run(self) -> None:
        failure: Exception | None = None
        try:
            slots = _AHEAD + 2  # one is filled, one is in use
            for number, ids in enumerate(self.iter_ixes):
                if self.terminate_event.is_set():
                    break
                (images,) = self.run_pipeline(number, ids, number % slots, None)
                self.output_queue.put(images)
        except Exception as error:
            failure = error
        self.output_queue.put(failure)

    def batches(self) -> Generator[Any, None, None]:
        while isinstance(item := self.output_queue.get(), np.ndarray):
            yield item
        if item is not None:
            raise item

    def stop(self) -> None:
        """Ends the thread and waits for that."""
        self.terminate_event.set()
        while self.is_alive():
            with contextlib.suppress(Empty):
                while True:
                    self.output_queue.get_nowait()
            self.join(timeout=0.01)
