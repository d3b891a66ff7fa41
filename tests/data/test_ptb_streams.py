"""Windows of parallel streams: which token goes where, and that none is lost or predicted twice."""

import os
from typing import Any

import pytest
import torch

from ban_fast.data import IGNORED, Shard, StreamLoader, TextLoader, load_corpus
from ban_fast.errors import OptionError

TEXT = torch.arange(1000)


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("length", [1, 7, 31])
def test_training_windows_are_full_and_streams_go_on(batch: int, length: int) -> None:
    loader = StreamLoader(TEXT, batch_size=batch, length=length)
    windows = list(loader.epoch())
    assert len(windows) == loader.steps_per_epoch == 999 // batch // length
    assert all(window.tokens.shape == window.targets.shape == (length, batch) for window in windows)
    assert all(torch.equal(window.targets, window.tokens + 1) for window in windows)
    assert [window.first for window in windows] == [i * length for i in range(len(windows))]
    streams = torch.cat([window.tokens for window in windows])
    starts = torch.arange(batch) * (999 // batch)
    assert torch.equal(streams, starts + torch.arange(len(streams))[:, None])
    assert loader.targets_per_epoch == streams.numel()


@pytest.mark.parametrize("size", [2, 34, 35, 36, 1000])
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("length", [1, 7, 35])
def test_evaluation_asks_for_every_token_once(size: int, batch: int, length: int) -> None:
    if size - 1 < batch:
        return
    loader = StreamLoader(TEXT[:size], batch_size=batch, length=length, training=False)
    windows = list(loader.epoch())
    assert len(windows) == loader.steps_per_epoch
    tokens, targets = (torch.cat([getattr(w, name) for w in windows]) for name in ("tokens", "targets"))
    kept = targets != -100
    assert torch.equal(targets.t()[kept.t()], TEXT[1:size])  # in the text's order, stream after stream
    assert torch.equal(targets[kept], tokens[kept] + 1)
    assert loader.targets_per_epoch == kept.sum() == size - 1
    if batch == 1:
        assert kept.all()


@pytest.mark.parametrize("training", [False, True])
def test_an_epoch_goes_on_from_any_window(training: bool) -> None:
    loader = StreamLoader(TEXT, batch_size=3, length=7, training=training)
    windows = list(loader.epoch())
    for start in (0, 5, len(windows)):
        rest = list(loader.epoch(start))
        assert len(rest) == len(windows) - start
        for value, expected in zip(rest, windows[start:], strict=True):
            assert value.first == expected.first
            assert torch.equal(value.tokens, expected.tokens)
            assert torch.equal(value.targets, expected.targets)


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"batch_size": 100}, "batch_size", "100 streams of 35 .* wider than the text, which has 1000; use 28 at most"),
        ({"batch_size": 1, "length": 1000}, "batch_size", "has 1000; use a longer text, or windows shorter than 1000"),
        ({"batch_size": 1000, "training": False}, "batch_size", "1000 streams of 1 .*; use 999 at most"),
        ({"batch_size": 0}, "batch_size", "must be at least 1, got 0"),
        ({"batch_size": 1, "length": 0}, "length", "must be at least 1, got 0"),
    ],
)
def test_a_batch_wider_than_the_text(options: dict[str, int], field: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        StreamLoader(TEXT, **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    StreamLoader(TEXT, batch_size=28)
    StreamLoader(TEXT, batch_size=999, training=False)


def test_steps_of_the_papers_recipes() -> None:
    directory = os.environ.get("BAN_FAST_DATA")
    if not directory or not os.path.isdir(os.path.join(directory, "ptb")):
        pytest.skip("BAN_FAST_DATA names no directory with Penn Treebank in ptb/")
    corpus = load_corpus("ptb", directory=directory)
    assert StreamLoader(corpus.train, batch_size=32).steps_per_epoch == 829
    assert StreamLoader(corpus.train, batch_size=20).steps_per_epoch == 1327
    test = StreamLoader(corpus.test, batch_size=20, training=False)
    assert test.targets_per_epoch == 82_429


@pytest.mark.parametrize("training", [True, False])
def test_windows_as_the_training_loop_takes_batches(training: bool) -> None:
    """A row for each target; where it stands in the text is its sample id, once an epoch, whatever the epoch."""
    options: dict[str, Any] = {"batch_size": 3, "length": 7, "training": training}
    loader, windows = TextLoader(TEXT, **options), list(StreamLoader(TEXT, **options).epoch())
    batches = list(loader.epoch(4))
    assert loader.steps_per_epoch == len(batches) == len(windows)
    for batch, window in zip(batches, windows, strict=True):
        assert torch.equal(batch.images, window.tokens)
        assert torch.equal(batch.labels, window.targets.flatten())
        place, stream = batch.sample_ids // 3, batch.sample_ids % 3
        kept = batch.labels != IGNORED
        own = (place - window.first) * 3 + stream  # its row in the window
        assert torch.equal(batch.images.flatten()[own][kept] + 1, batch.labels[kept])
        assert not batch.views.any()
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert torch.equal(ids, torch.arange(len(ids)))
    assert len(loader) == sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    again = list(loader.epoch(0, start=5))
    assert all(
        torch.equal(a, b)
        for one, other in zip(again, batches[5:], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert loader.sample_shape == (7,)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_streams(count: int) -> None:
    """Each has columns of every window, with the ids that they have in the whole."""
    options: dict[str, Any] = {"batch_size": 6, "length": 7}
    shards = [TextLoader(TEXT, shard=Shard(number, count), **options).epoch(0) for number in range(count)]
    for whole, *parts in zip(TextLoader(TEXT, **options).epoch(0), *shards, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts], 1), whole.images)
        for name in ("labels", "sample_ids", "views"):
            columns = [getattr(part, name).view(7, 6 // count) for part in parts]
            assert torch.equal(torch.cat(columns, 1).flatten(), getattr(whole, name))
