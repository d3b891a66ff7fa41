"""DenseNet training steps as tests of pytest-benchmark's: one measurement, whose laps each provider's test replays."""

from typing import Any

import pytest

from benchmarks import densenet, run
from benchmarks.conftest import RUN
from benchmarks.harness import TIME_OVER
from benchmarks.test_losses import REPLAY

CASES = densenet.cases(run.device())
PROVIDERS = densenet.usual(run.device())
RECORDS: dict[densenet.Case, densenet.Record] = {}


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_training_step(benchmark: Any, pytestconfig: pytest.Config, case: densenet.Case, provider: str) -> None:
    if case != CASES[0] and not pytestconfig.getoption("--full"):
        pytest.skip("left out, but for --full")
    if case not in RECORDS:
        left = pytestconfig.stash[RUN].seconds_left()
        RECORDS[case] = densenet.measure(case, run.device(), providers=PROVIDERS, timeout=left)
    entry = RECORDS[case]["providers"][provider]
    if (entry["failed"] or "").startswith(TIME_OVER.split(":")[0]):
        pytest.skip(entry["failed"])
    assert entry["failed"] is None, entry["failed"]
    assert entry["off"] <= densenet.LIMITS[case.amp]
    benchmark.group = case.title
    benchmark.extra_info.update({key: value for key, value in entry.items() if key != "laps_s"})
    REPLAY.load(entry["laps_s"])
    benchmark.pedantic(lambda: None, rounds=len(entry["laps_s"]))
