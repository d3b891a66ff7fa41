"""Shards of a loader: together they serve the very batches of one process, whatever stores the images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ban_fast import data
from ban_fast.data import Augmentation, Batch, FFCVLoader, ImageLoader, Shard, TensorLoader, TorchLoader, streamed
from ban_fast.data.beton import missing
from ban_fast.data.cifar import CIFAR

FFCV = pytest.param("ffcv", marks=pytest.mark.skipif(missing() is not None, reason=str(missing())))
KINDS = ["memory", "torch", FFCV]


def put_together(shards: list[Batch]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*shards, strict=True)]


def check_shards(make: Callable[..., Any], of: int, start: int = 0) -> list[list[int]]:
    """That shards are the whole's parts; returns how many samples each of them has of every batch."""
    whole = list(make().epoch(3, start))
    shards = [list(make(shard=Shard(number, of)).epoch(3, start)) for number in range(of)]
    for number, batch in enumerate(whole):
        for tensor, expected in zip(put_together([shard[number] for shard in shards]), batch, strict=True):
            assert torch.equal(tensor, expected)
    return [[len(batch.labels) for batch in shard] for shard in shards]


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_loader(kind: str, tmp_path: Path, make_cifar: Callable[..., Path], monkeypatch: Any) -> None:
    make_cifar(CIFAR["cifar10"], tmp_path, 20)
    monkeypatch.setattr(TorchLoader, "workers", 0)
    if kind == "memory":
        dataset: Any = data.load("cifar10", directory=tmp_path)
    else:
        if kind == "ffcv":
            data.prepare_ffcv("cifar10", tmp_path)
        dataset = data.load_stored("cifar10", ffcv=kind == "ffcv", directory=tmp_path)

    def make(**options: Any) -> ImageLoader[Any]:
        given = {"mean": dataset.mean, "std": dataset.std, "seed": 5, "augmentation": Augmentation(), **options}
        return data.open_loader(dataset.train, batch_size=16, **given)

    assert isinstance(make(), {"torch": TorchLoader, "ffcv": FFCVLoader}.get(kind, ImageLoader))
    assert check_shards(make, 3, start=4) == [[5, 5], [5, 5], [6, 6]]


@pytest.mark.parametrize(
    ("samples", "drop_last", "sizes"),
    [
        (35, True, [[2] * 3, [3] * 3, [2] * 3, [3] * 3]),  # batches of 10, and 5 samples dropped
        (35, False, [[2, 2, 2, 1], [3, 3, 3, 1], [2, 2, 2, 1], [3, 3, 3, 2]]),
        (7, True, [[1], [2], [2], [2]]),  # all there are
    ],
)
def test_tensors_in_uneven_shards(samples: int, drop_last: bool, sizes: list[list[int]]) -> None:
    x, y = torch.randn(samples, 2), torch.arange(samples)

    def make(**options: Any) -> TensorLoader:
        return TensorLoader(x, y, batch_size=10, seed=1, drop_last=drop_last, **options)

    assert check_shards(make, 4) == sizes
    assert make().whole_batch == make(shard=Shard(2, 4)).whole_batch == min(10, samples)


def test_which_sample_is_whose_changes_with_the_epoch() -> None:
    loader = TensorLoader(torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64), batch_size=8, shard=Shard(1, 2))
    first, second = (set(torch.cat([batch.sample_ids for batch in loader.epoch(e)]).tolist()) for e in (0, 1))
    assert len(first) == len(second) == 32
    assert first != second


def test_processes_of_a_machine_share_its_cores(
    tmp_path: Path, make_cifar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar(CIFAR["cifar10"], tmp_path, 20)
    dataset = data.load_stored("cifar10", ffcv=False, directory=tmp_path)
    asked = []

    def ask(*_: Any, num_workers: int, **options: Any) -> list[Tensor]:
        asked.append(num_workers)
        return []

    monkeypatch.setattr(streamed, "cores", lambda: 12)
    monkeypatch.setattr(streamed, "DataLoader", ask)
    for shard in (Shard(), Shard(0, 8, beside=4), Shard(0, 64, beside=32)):
        loader = TorchLoader(dataset.train, mean=dataset.mean, std=dataset.std, batch_size=1, shard=shard)
        assert list(loader._stored([torch.zeros(1, dtype=torch.int64)] * 90)) == []
    assert asked == [12, 3, 1]
