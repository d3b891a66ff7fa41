"""Kept rows that lie in another memory than the device's: those of the batches at hand are brought to it.

There the losses read them in place, as they read a table that is on the device as a whole; so recorded steps do too.
"""

import torch
from torch import Tensor

_FULL = torch.float32
"""What confidences are kept in."""


class StagedRows:
    """Room on the device for the rows of some batches, and where in it each lies."""

    def __init__(self, keys: int, width: int, dtype: torch.dtype, device: torch.device, with_confidence: bool) -> None:
        """Keys are below `keys`, rows [width] each; `with_confidence`: a number beside each."""
        self.places = torch.zeros(keys, dtype=torch.int32, device=device)
        """int32 [keys]: the row of each key that was brought last; of others, any row."""
        self.rows = torch.empty(0, width, dtype=dtype, device=device)
        """[room, width]."""
        self.confidence = torch.empty(0, 1, dtype=_FULL, device=device) if with_confidence else None
        """[room, 1]."""

    def bring(
        self, keys: Tensor, slots: Tensor, table: Tensor, confidence: Tensor | None, room: int
    ) -> None:  # [n], [n], [M, width], [M, 1]
        """Have the rows `slots` of `table`, which lies elsewhere, here under `keys`, in place of all before.

        `confidence` lies here. `room`: so many rows, n at least, are the most that one call brings: what they are read
        from stays where it is. On a GPU this waits for it once, as the host must know which rows they are.
        """
        if room > len(self.rows):
            self.rows = self.rows.new_empty(room, self.rows.shape[1])
            if self.confidence is not None:
                self.confidence = self.confidence.new_empty(room, 1)
        is_pinned = self.rows.device.type == "cuda"  # from there a copy waits for nothing, and torch keeps it till then
        fetched = torch.empty(len(slots), table.shape[1], dtype=table.dtype, pin_memory=is_pinned)
        torch.index_select(table, 0, slots.cpu(), out=fetched)
        self.rows[: len(slots)].copy_(fetched, non_blocking=True)
        if self.confidence is not None:
            assert confidence is not None
            torch.index_select(confidence, 0, slots, out=self.confidence[: len(slots)])
        self.places[keys] = torch.arange(len(keys), dtype=torch.int32, device=self.places.device)
