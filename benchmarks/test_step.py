"""Whole training steps as tests of pytest-benchmark's: one measurement a case; each trainer's test replays its laps."""

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import run, step, step_figures, trainers
from benchmarks.test_losses import Replay

REPLAY = Replay()
SECONDS = 20.0
"""Of a case's rounds, but for --full: seven of them; what comes after has its time too."""
CASES = step.cases(run.device())
measure = cache(step.measure_apart)
NAMES = tuple(trainers.trainers(torch.device(run.device())))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_whole_step(benchmark: Any, pytestconfig: pytest.Config, case: step_figures.Case, name: str) -> None:
    if case != CASES[0] and not pytestconfig.getoption("--full"):
        pytest.skip("left out, but for --full")
    record = measure(case, run.device(), seconds=None if pytestconfig.getoption("--full") else SECONDS)
    entry = record["trainers"][name]
    assert entry["failed"] is None, entry["failed"]
    assert entry["off"] is None or entry["off"] <= step.LIMITS[run.device()]
    benchmark.group = f"{case.title}, seconds a step"
    seconds = step_figures.seconds(record, name)
    assert seconds is not None
    benchmark.extra_info.update(
        images=record["images"],
        images_per_s=case.batch / seconds,
        shares=entry["shares"],
        of_supervised=step_figures.over(record, name, step_figures.SUPERVISED),
    )
    REPLAY.load(entry["laps_s"])
    benchmark.pedantic(lambda: None, rounds=len(entry["laps_s"]))
