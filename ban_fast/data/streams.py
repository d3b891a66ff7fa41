"""A text in parallel streams, a window of all of them at a time: what recurrent models are trained and tested on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .loaders import WHOLE, Batch, Shard

IGNORED = -100
"""The target where a stream has ended: the losses' default ignore_index."""


@dataclass(frozen=True, eq=False)
class Window:
    """Some places of every stream, each with the token after it."""

    tokens: Tensor
    """int64 [T, B]."""
    targets: Tensor
    """int64 [T, B]: the token that follows, IGNORED past the text's end."""
    first: int
    """Place of the first row in the streams: row t, stream b is entry (first + t) * B + b of what is kept for each."""


class StreamLoader:
    """A text cut into `batch_size` contiguous streams, served in windows of `length` places, the same every epoch.

    Stream b goes on in window i + 1 where it stopped in window i, so state is carried from one to the next. To train,
    all windows are full, and what is left of every stream is not read (829 windows of 35 x 32 for Penn Treebank). To
    evaluate, every token after the text's first is a target once, and the last stream is padded.

    Args:
        text: int64 [N].
        batch_size: streams, at least 1.
        length: places a window, at least 1.
        training: which of the two.
        device: where the streams lie.

    Raises:
        OptionError: a text too short for so many streams, or a number below 1.
    """

    exact_resume = True

    def __init__(
        self,
        text: Tensor,
        *,
        batch_size: int,
        length: int = 35,
        training: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("length", length)):
            if value < 1:
                raise OptionError(name, f"must be at least 1, got {value}")
        least = length if training else 1
        predicted = len(text) - 1
        if predicted < batch_size * least:
            most = max(0, predicted) // least
            raise OptionError(
                "batch_size",
                f"{batch_size} streams of {least} and one more token are wider than the text, which has {len(text)}; "
                + (f"use {most} at most" if most else f"use a longer text, or windows shorter than {length}"),
            )
        self.batch_size, self.length = batch_size, length
        places = predicted // batch_size // length * length if training else math.ceil(predicted / batch_size)
        self.steps_per_epoch = math.ceil(places / length)
        self.targets_per_epoch = batch_size * places if training else predicted
        self._tokens = _streams(text[:-1], batch_size, places, 0).to(device)
        self._targets = _streams(text[1:], batch_size, places, IGNORED).to(device)

    def epoch(self, start: int = 0) -> Iterator[Window]:
        """The windows from number `start` on."""
        for first in range(start * self.length, len(self._tokens), self.length):
            rows = slice(first, first + self.length)
            yield Window(self._tokens[rows], self._targets[rows], first)


class TextLoader:
    """The windows of a `StreamLoader` as the training loop takes batches; arguments and errors are the same.

    `Batch.images` is a window's tokens, int64 [T, B]; its other tensors have a row for each of them, [T * B], place by
    place: the token that follows as label (IGNORED past the text's end), and as sample id where it stands, which is the
    same in every epoch. A `shard` has some of the streams, side by side as ever, each as long as in the whole.
    """

    exact_resume = True

    def __init__(
        self,
        text: Tensor,
        *,
        batch_size: int,
        length: int = 35,
        training: bool = True,
        device: str | torch.device = "cpu",
        shard: Shard = WHOLE,
    ) -> None:
        self._streams = StreamLoader(text, batch_size=batch_size, length=length, training=training, device=device)
        self.steps_per_epoch = self._streams.steps_per_epoch
        self.sample_shape = (length,)
        self.shard = shard
        self._own = shard.cut(slice(0, batch_size))

    def __len__(self) -> int:
        """Tokens that are predicted in an epoch, by all shards together."""
        return self._streams.targets_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The windows from number `start` on, in the text's order."""
        for window in self._streams.epoch(start):
            places = torch.arange(window.targets.numel(), device=window.targets.device).view_as(window.targets)
            ids = (places + window.first * self._streams.batch_size)[:, self._own].flatten()
            targets = window.targets[:, self._own].flatten()
            yield Batch(window.tokens[:, self._own].contiguous(), targets, ids, torch.zeros_like(ids))


def _streams(values: Tensor, batch: int, places: int, filling: int) -> Tensor:  # [P] -> [places, batch]
    """Streams side by side, each as long as the text allows: its share, of which `places` are kept."""
    share = max(places, len(values) // batch)
    padded = values.new_full((batch * share,), filling)
    count = min(len(values), len(padded))
    padded[:count] = values[:count]
    return padded.view(batch, share)[:, :places].t().contiguous()
