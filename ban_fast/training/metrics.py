"""What is measured while training: sums that stay on the device, and a line of metrics.jsonl an epoch."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .distributed import ALONE, Ranks
from .objectives import Terms


class Meter:
    """An epoch's means of loss, terms and error, gathered on the device without waiting for it.

    Each of several ranks has sums of its own, which are put together when they are asked for, by all.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._ranks = ranks
        self.images = 0
        self.arrived: float | None = None
        """The mean loss when `was_finite` looked, where it was a finite one; of several ranks none knows it alone."""
        self._arriving: tuple[Tensor, torch.cuda.Event, int] | None = None  # a sum, when it is there, of so many images

    def add(self, terms: Terms, logits: Tensor, labels: Tensor, whole: int) -> None:  # [B, C], [B]
        """The part that these have in a batch of `whole` samples, on the device; `images` is counted by the caller."""
        loss = terms.loss.detach()
        wrong = (logits.detach().argmax(dim=1) != labels).to(loss.dtype).sum() / whole
        self._sums.add_(torch.stack((loss, terms.kd, terms.label, wrong)), alpha=whole)

    @property
    def sums(self) -> Tensor:
        """Over all ranks."""
        return self._sums if self._ranks.is_alone else self._ranks.sum(self._sums.clone())

    def restore(self, sums: Tensor, images: int) -> None:
        """Take up the `sums` and `images` of a checkpoint."""
        if self._ranks.is_first:
            self._sums.copy_(sums)
        self.images = images

    def is_finite(self) -> bool:
        """Whether every loss so far was: NaN and infinity stay in a sum. Waits for the device."""
        (is_broken,) = self._ranks.any(not math.isfinite(self._sums[0].item()))
        return not is_broken

    def was_finite(self) -> bool:
        """`is_finite`; on a GPU as it was when this was last asked: what is asked for now arrives in the meantime.

        So the device is never without work, and the host no further ahead of it than from one question to the next.
        """
        if self._sums.device.type == "cuda":
            loss, images = self._before()
        else:
            loss, images = self._sums[0].item(), self.images
        is_finite = math.isfinite(loss)
        self.arrived = loss / images if images and is_finite and self._ranks.is_alone else None
        (is_broken,) = self._ranks.any(not is_finite)
        return not is_broken

    def _before(self) -> tuple[float, int]:
        """The loss's sum and its images when this was last asked; 0 of 0 at first."""
        found = 0.0, 0
        if self._arriving is None:
            loss = torch.zeros((), dtype=self._sums.dtype, pin_memory=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            loss, arrival, images = self._arriving
            arrival.synchronize()
            found = loss.item(), images
        loss.copy_(self._sums[0], non_blocking=True)
        arrival.record(torch.cuda.current_stream(self._sums.device))
        self._arriving = loss, arrival, self.images
        return found

    def means(self) -> dict[str, float | None]:
        """{"loss", "kd", "label": nats, "error": percent}, means over the images so far. Waits for the device.

        None where a term is not finite, which a term of weight 0 may be, beside logits of -inf.
        """
        loss, kd, label, wrong = (self.sums / max(self.images, 1)).tolist()
        means = {"loss": loss, "kd": kd, "label": label, "error": 100 * wrong}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        self._sums.zero_()
        self.images = 0


class Journal:
    """metrics.jsonl: appended to, and cut back to a length that a checkpoint remembers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0

    def cut(self, length: int) -> None:
        """Keep the first `length` bytes: what was written after the checkpoint will be written again."""
        try:
            with open(self.path, "ab") as file:
                if file.tell() < length:
                    raise UserError(
                        f"{self.path} is cut short: the checkpoint beside it knows {length} bytes of it; delete the "
                        "checkpoint to train its generation again from the start"
                    )
                file.truncate(length)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.bytes = length

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, whole or not at all."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.bytes)
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.bytes += len(line)

    def sync(self) -> None:
        """Make sure that the disk has it: a checkpoint is about to rely on it."""
        try:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
