"""Every loader's epochs as a test of pytest-benchmark's, replayed: `loaders.measure` has the clock, in turn."""

from typing import Any

import pytest

from benchmarks import loaders
from benchmarks.test_losses import Replay

REPLAY = Replay()


@pytest.fixture(scope="module")
def record() -> loaders.Record:
    return loaders.measure()


@pytest.mark.benchmark(timer=REPLAY, group="loaders alone, seconds an image of CIFAR")
@pytest.mark.parametrize("loader", [*loaders.OURS, loaders.TORCHVISION, loaders.FFCV])
def test_an_epoch(benchmark: Any, record: loaders.Record, loader: str) -> None:
    if loader in record["absent"]:
        pytest.skip(f"absent: {record['absent'][loader]}")
    laps = record["seconds_per_image"][loader]
    benchmark.extra_info.update(
        images_per_s=record["images_per_s"][loader],
        memory_is_faster_by=loaders.speed_up(record, loader),
        targets=record["targets"],
    )
    REPLAY.load(laps)
    benchmark.pedantic(lambda: None, rounds=len(laps))
