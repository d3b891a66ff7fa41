"""A teacher that is asked once for each view of an image: its rows are kept, and the losses read them in place.

What it gives is what a live teacher gives, to the bit, where the teacher's kernels are batch-invariant: where the
logits of an image don't depend on the other images of a batch of the same size. So the images whose rows are missing
are gathered from some batches ahead, and shown to the teacher in batches of exactly the training's size. Rows kept in
fewer bits than the logits have are rounded, and all that is made of logits is made of those: DKPP's argmax is the
lowest index of the rounded row's largest value.

Of several ranks each computes what its own shards miss, and all keep all of it, as each epoch deals the images anew;
one file, rank 0's, remembers it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import UserError
from .cache_store import FileRows, MemoryRows
from .distributed import ALONE, Ranks
from .reader import Reader
from .staged_rows import StagedRows
from .teacher import Frozen, Taught, check_fingerprint, dtype_name

_MOST_AHEAD = 16
"""Batches: the last of the teacher's own, which is filled up, costs at most one forward pass in so many."""
_BYTES_AHEAD = 2**26
_ROWS_AT_A_TIME = 65_536
UNKNOWN = -1


class Computed(NamedTuple):
    """What a teacher said of some images."""

    keys: Tensor
    """int64 [n]."""
    kept: Tensor
    """[n, width], in the cache's dtype."""
    confidence: Tensor
    """fp32 [n, 1]."""


class CachedTeacher(Frozen):
    """A frozen network and the rows that are known of it, by (sample, view)."""

    def __init__(
        self,
        network: nn.Module,
        reader: Reader | None = None,
        *,
        rows: MemoryRows | FileRows,
        samples: int,
        views: int,
        batch_size: int,
        device: torch.device,
        only_confidence: bool = False,
        with_confidence: bool = False,
        on_device: bool = True,
        expected: int = 0,
        is_own: bool = False,
        is_folded: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Sample ids are below `samples`, views below `views`; the network is shown `batch_size` images at a time.

        `only_confidence`: rows of one number, the largest softmax output, which is all that CWTM needs;
        `with_confidence`: rows of logits, and that number of each, from the logits before they were rounded.
        `on_device`: whether a copy of rows that lie elsewhere is kept in the device's memory; where it is not, those
        of some batches at a time are brought there.
        `expected`: so many rows, all told, that room for them in memory is taken at once.
        `is_own`: whether files are for this teacher's students alone.
        Of several `ranks`, only rank 0 has `rows` that may be there already: the others `share` them.
        UserError, with the files closed, where rows that are there can't be this network's.
        """
        super().__init__(network, reader, is_folded=is_folded)
        self._rows = rows
        self.device = device
        self._views, self._batch_size = views, batch_size
        self._only_confidence, self._is_own, self._ranks = only_confidence, is_own, ranks
        self._slots = torch.full((samples * views,), UNKNOWN, dtype=torch.int32, device=device)
        self._copy: MemoryRows | None = None
        self._forwards_before = 0  # whose rows were lost since
        table = rows.table
        self._dtype, self._row_bytes = table.dtype, table.shape[1] * table.itemsize
        self._staged: StagedRows | None = None
        if _is_elsewhere(table, device):
            if on_device:
                self._copy = MemoryRows(table.shape[1], table.dtype, device)
            else:
                self._staged = StagedRows(len(self._slots), table.shape[1], table.dtype, device, with_confidence)
        self._confidence = MemoryRows(1, torch.float32, device) if with_confidence else None
        for kept in (rows, self._copy, self._confidence):
            if isinstance(kept, MemoryRows):
                kept.reserve(min(expected, len(self._slots)))
        if isinstance(rows, FileRows) and rows.count:
            try:
                self._take_up(rows, with_confidence)
            except BaseException:
                rows.close()
                raise

    @property
    def has_confidences(self) -> bool:
        """Whether CWTM learns from the number that is kept, and not from logits."""
        return self._only_confidence or self._confidence is not None

    def dtype_for(self, objective: str) -> torch.dtype:
        """What its students of an objective learn from: a confidence is fp32 whatever the logits are."""
        return torch.float32 if objective == "cwtm" and self.has_confidences else self._dtype

    @property
    def known(self) -> int:
        """Rows that there are."""
        return self._rows.count

    @property
    def capacity(self) -> int:
        """Views of all samples: rows that there could be."""
        return len(self._slots)

    @property
    def forward_images(self) -> int:
        """Images that went through the network for the students of this run."""
        return self._forwards_before + self._rows.forwards

    def begin(self) -> None:
        """Rows are known by their keys, whatever came before."""

    def ahead(self, batch: Batch) -> int:
        """As many as 64 MiB hold, with their rows, at most 16; as many on every rank, though some may have an image
        less."""
        image = batch.images[0].numel() * batch.images.element_size()
        size = max(self._batch_size * (image + self._row_bytes), 1)
        return min(max(_BYTES_AHEAD // size, 1), _MOST_AHEAD)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Compute what is not known of them, and bring their rows to the device, if they lie elsewhere.

        On a GPU this waits for it, once or twice in all these batches.
        """
        assert all(len(batch.images) <= self._batch_size for batch in batches)
        keys = torch.cat([self.keys(batch.sample_ids, batch.views) for batch in batches])
        places = self.unknown(keys).nonzero()[:, 0]
        computed = self._computed(batches, places, keys[places]) if len(places) else iter(())
        if self._ranks.is_alone:
            for some in computed:
                self._append(some, self._batch_size)
        else:
            self._exchange(list(computed))
        self._stage(keys, self.ahead(batches[0]))

    def _stage(self, keys: Tensor, batches: int) -> None:  # [n]
        """Have the rows under `keys`, of at most so many batches, on the device, where the table isn't."""
        if self._staged is not None:
            confidence = None if self._confidence is None else self._confidence.room
            room = max(batches * self._batch_size, len(keys))
            self._staged.bring(keys, self._slots[keys].long(), self._rows.table, confidence, room)

    def _computed(self, batches: Sequence[Batch], places: Tensor, wanted: Tensor) -> Iterator[Computed]:
        """Of the images at `places` [n], counted through the batches, whose keys are `wanted` [n]."""
        images = torch.cat([batch.images for batch in batches]).index_select(0, places)
        for start in range(0, len(wanted), self._batch_size):
            part = slice(start, start + self._batch_size)
            # Strides as a batch has them: of a single channel they tell kernels which layout to work in.
            shape, strides = (self._batch_size, *images.shape[1:]), batches[0].images.stride()
            shown = torch.empty_strided(shape, strides, dtype=images.dtype, device=images.device)
            shown[: len(images[part])] = images[part]
            shown[len(images[part]) :] = images[-1]
            yield self._of(wanted[part], self.logits(shown)[: len(wanted[part])])

    def _exchange(self, own: list[Computed]) -> None:
        """Keep what each rank computed, in the order of ranks: they all have the same rows at the same places."""
        forwards = [len(own) * self._batch_size] * self._ranks.size
        mine = Computed(*map(torch.cat, zip(*own, strict=True))) if own else None
        counts = self._ranks.gather((len(own), 0 if mine is None else len(mine.keys)))
        for rank, (chunks, count) in enumerate(counts):
            forwards[rank] = chunks * self._batch_size
            if count:
                some = mine if rank == self._ranks.rank and mine is not None else self._empty(count)
                self._append(Computed(*(self._ranks.broadcast(tensor, rank) for tensor in some)), forwards[rank])

    def share(self) -> None:
        """Give the rows that rank 0 has taken up to all ranks; to be called by all, once."""
        if self._ranks.is_alone:
            return
        rows = self._rows
        count, forwards = self._ranks.first(lambda: (rows.count, rows.forwards))
        for start in range(0, count, _ROWS_AT_A_TIME):
            some = self._empty(min(_ROWS_AT_A_TIME, count - start))
            if isinstance(rows, FileRows):
                part = slice(start, start + _ROWS_AT_A_TIME)
                some.keys.copy_(rows.keys[part])
                some.kept.copy_(rows.table[part])
                if self._confidence is not None:
                    some.confidence.copy_(self._confidence.table[part])
            for tensor in some:
                self._ranks.broadcast(tensor, 0)
            if not self._ranks.is_first:
                self._append(some, 0)
        rows.forwards = forwards

    def _empty(self, count: int) -> Computed:
        width, device = self._rows.table.shape[1], self.device
        return Computed(
            torch.empty(count, dtype=torch.int64, device=device),
            torch.empty(count, width, dtype=self._dtype, device=device),
            torch.empty(count, 1, device=device),
        )

    def lacks(self, sample_ids: Tensor, views: Tensor) -> Tensor:
        """Whose rows are not known, or not on the device for more than some batches."""
        if self._staged is not None:
            return torch.ones_like(sample_ids, dtype=torch.bool)
        return self.unknown(self.keys(sample_ids, views))

    def keys(self, sample_ids: Tensor, views: Tensor) -> Tensor:  # [n], [n] -> [n]
        """What rows are known by: all views of all samples, counted."""
        return sample_ids * self._views + views

    def unknown(self, keys: Tensor) -> Tensor:  # [n] -> bool [n]
        """Which of these have no row yet."""
        return self._slots[keys] == UNKNOWN

    def addresses(self) -> Sequence[int]:
        """Where tables lie that grow, and their size."""
        _, table, confidence = self._here()
        return table.data_ptr(), len(table), 0 if confidence is None else confidence.data_ptr()

    def _here(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """On the device: where each key's row is, int32; rows [room, width], and confidences [room, 1], if they are
        kept beside. What is in memory has room for rows to come, and stays where it is until that is full."""
        if self._staged is not None:
            return self._staged.places, self._staged.rows, self._staged.confidence
        rows = self._rows if self._copy is None else self._copy
        table = rows.room if isinstance(rows, MemoryRows) else rows.table
        return self._slots, table, None if self._confidence is None else self._confidence.room

    def __call__(self, batch: Batch) -> Taught:
        """Its rows, where they lie."""
        places, table, confidence = self._here()
        rows = places[self.keys(batch.sample_ids, batch.views)].long()
        if self._only_confidence:
            return Taught(None, rows, table[:, 0])
        return Taught(table, rows, None if confidence is None else confidence[:, 0])

    def record(self, rows: int, unit: str = "images", objective: str = "") -> dict[str, Any]:
        """How many images the teacher saw, for all students that share it in this run."""
        dtype = dtype_name(self.dtype_for(objective))
        record = {"mode": "cache", "dtype": dtype, f"forward_{unit}": self.forward_images}
        return record | self.manner()

    def state(self) -> dict[str, Any]:
        """Which teacher it is, and how often it was asked."""
        return {"mode": "cache", "fingerprint": self.fingerprint, "forward_images": self.forward_images}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`. UserError if it was another teacher's."""
        check_fingerprint(state, self.fingerprint)
        self._forwards_before = max(self._forwards_before, state.get("forward_images", 0) - self._rows.forwards)

    def sync(self) -> None:
        """Rows that a checkpoint's step has read are on disk before it: a resumed run meets the same ones."""
        self._ranks.first(self._rows.sync)

    def close(self) -> None:
        """Let go of the files."""
        self._rows.close()

    def dismiss(self) -> None:
        """Let go of the files; those of the run's own go with its students."""
        if self._is_own and isinstance(self._rows, FileRows):
            self._rows.remove()
        else:
            self.close()

    def _take_up(self, rows: FileRows, with_confidence: bool) -> None:
        """Know the rows that are there. UserError if they are of images or views that training does not show."""
        if int(rows.keys.min()) < 0 or int(rows.keys.max()) >= len(self._slots):
            raise UserError(
                f"{rows.path} has rows of views that these data have not: delete the directory to compute it again, "
                "or choose another --cache-dir"
            )
        self._place(rows.keys.to(self.device), 0)
        table, exact = rows.table, rows.confidences if with_confidence else None
        for start in range(0, rows.count, _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            self._keep_beside(table[part], _confidence(table[part]) if exact is None else exact[part])

    def compute(self, keys: Tensor, images: Tensor) -> None:  # [n], [m, ...], n <= m
        """The rows of the first n images, which have none yet; the others fill a batch up."""
        self._keep(keys, self.logits(images)[: len(keys)], len(images))

    def _of(self, keys: Tensor, logits: Tensor) -> Computed:  # [n], [n, C]
        confidence = _confidence(logits)
        values = confidence if self._only_confidence else logits
        kept = values.to(self._dtype)
        if self._dtype == torch.float16 and not torch.equal(kept.isfinite(), values.isfinite()):
            raise UserError(
                f"the teacher has a logit of {values.abs().max().item():.3g}, which fp16 can't hold: "
                "use --cache-dtype bf16 or fp32 and another --out"
            )
        return Computed(keys, kept, confidence)

    def _keep(self, keys: Tensor, logits: Tensor, shown: int) -> None:  # [n], [n, C]
        self._append(self._of(keys, logits), shown)

    def _append(self, some: Computed, forwards: int) -> None:
        first = self._rows.count
        self._rows.append(some.kept, forwards, some.keys, some.confidence)
        self._place(some.keys, first)
        self._keep_beside(some.kept, some.confidence)

    def _keep_beside(self, kept: Tensor, confidence: Tensor) -> None:  # [n, width], [n, 1]
        if self._copy is not None:
            self._copy.append(kept, 0)
        if self._confidence is not None:
            self._confidence.append(confidence, 0)

    def _place(self, keys: Tensor, first: int) -> None:
        self._slots[keys] = torch.arange(first, first + len(keys), dtype=torch.int32, device=self.device)


def _is_elsewhere(table: Tensor, device: torch.device) -> bool:
    """Whether kernels on the device can't read a table where it lies."""
    return table.device.type != device.type


def _confidence(logits: Tensor) -> Tensor:  # [n, C] -> [n, 1]
    """CWTM's c (eq. 10), in fp32."""
    return logits.float().softmax(1).amax(1, keepdim=True)
