"""A language model that teaches from its kept outputs: its logits at every place of the text, computed once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ..data import Batch
from .teacher import Taught
from .teacher_cache import UNKNOWN, CachedTeacher


class CachedTextTeacher(CachedTeacher):
    """A frozen language model along a text whose windows are the same in every epoch, and its rows by their place.

    A row depends on all that came before in the text: until every window has been read, the network follows them in
    order, its state carried. A session that begins in the midst of a text follows it from its start: no state of the
    network is kept, and the rows are those of a session that was never stopped, to the bit.
    """

    def __init__(self, *arguments: Any, windows: Callable[[], Iterator[Batch]], **options: Any) -> None:
        """`windows` serves those of an epoch; the other arguments are a `CachedTeacher`'s."""
        super().__init__(*arguments, **options)
        self._windows = windows
        self._at: int | None = None  # the window that the network's state stands before
        self._is_ready = False  # for the windows that it was prepared for

    @property
    def _knows_all(self) -> bool:
        return self._rows.count == len(self._slots)

    def ahead(self, batch: Batch) -> int:
        """One window at a time, until all have been read."""
        return super().ahead(batch) if self._knows_all else 1

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Bring rows to the device, if they lie elsewhere, once all are known.

        None is computed: another student's batches may be among these, and those that are asked for tell where the text
        has come to.
        """
        self._is_ready = self._knows_all
        if self._is_ready:
            self._stage(torch.cat([self.keys(batch.sample_ids, batch.views) for batch in batches]), len(batches))

    def __call__(self, batch: Batch) -> Taught:
        """Its rows, where they lie; those of a window that no epoch has shown yet are computed first."""
        if not self._is_ready:
            if not self._knows_all:
                self._follow(batch)
            self._stage(self.keys(batch.sample_ids, batch.views), 1)
        return super().__call__(batch)

    def _follow(self, batch: Batch) -> None:
        number = int(batch.sample_ids[0]) // len(batch.sample_ids)
        if number != self._at:
            self.reader.begin()
            for before in islice(self._windows(), number):
                self._read(before)
        self._read(batch)
        self._at = number + 1

    def _read(self, batch: Batch) -> None:
        keys = self.keys(batch.sample_ids, batch.views)
        logits = self.logits(batch.images)
        if self._slots[keys[0]] == UNKNOWN:  # a window's rows are kept together or not at all
            self._keep(keys, logits, len(keys))
