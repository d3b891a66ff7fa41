"""DenseNet training steps as tests of pytest-benchmark's: one measurement, whose laps each provider's test replays."""

from functools import cache
from typing import Any

import pytest

from benchmarks import densenet, run
from benchmarks.test_losses import REPLAY

CASES = densenet.cases(run.device())
measure = cache(densenet.measure)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("provider", densenet.PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_training_step(benchmark: Any, pytestconfig: pytest.Config, case: densenet.Case, provider: str) -> None:
    if case != CASES[0] and not pytestconfig.getoption("--full"):
        pytest.skip("left out, but for --full")
    entry = measure(case, run.device(), providers=densenet.PROVIDERS)["providers"][provider]
    assert entry["failed"] is None, entry["failed"]
    assert entry["off"] <= densenet.LIMITS[case.amp]
    benchmark.group = case.title
    benchmark.extra_info.update({key: value for key, value in entry.items() if key != "laps_s"})
    REPLAY.load(entry["laps_s"])
    benchmark.pedantic(lambda: None, rounds=len(entry["laps_s"]))
