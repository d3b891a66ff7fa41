"""Every provider of every case as a test of pytest-benchmark's.

The harness has the clock: providers take turns there, in the measuring processes, and all tests of a case wait for that
one measurement. A test then hands its provider's laps to pytest-benchmark through `Replay`, a timer that reads out what
the clock said; statistics, groups and --benchmark-json are pytest-benchmark's.
"""

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.run import Run
from benchmarks.session import OutOfTime, WorkerFailed


class Replay:
    """A timer for pytest-benchmark: two readings a lap, as far apart as the lap was long."""

    __name__ = "Replay"  # pytest-benchmark's JSON names its timer

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, laps: Iterable[float]) -> None:
        """Laps in seconds, for the rounds to come."""
        self._readings = [reading for lap in laps for reading in (0.0, lap)]

    def __call__(self) -> float:
        return self._readings.pop(0)


REPLAY = Replay()


@pytest.mark.benchmark(timer=REPLAY)
def test_forward_and_backward(benchmark: Any, run: Run, case: Case, setting: str, provider: str) -> None:
    try:
        record = next(record for record in run.measure(case) if record["setting"] == setting)
    except OutOfTime:
        pytest.skip("left out: the run's time was over")
    except WorkerFailed as error:
        pytest.fail(str(error), pytrace=False)
    entry = record["providers"][provider]
    if entry["absent"] is not None:
        pytest.skip(f"absent: {entry['absent']}")
    assert entry["failed"] is None, entry["failed"]
    if entry["kind"] != "ban_fast" and entry["refused"] is not None:
        pytest.skip(f"no time: {entry['refused']}")
    assert entry["refused"] is None, entry["refused"]

    laps = record["laps_s"][provider]
    benchmark.group = f"{case.title}, {setting}"
    benchmark.extra_info.update(
        {
            "case": record["case"],
            "bytes": record["bytes"],
            "streams_gb_s": record["streams_gb_s"],
            "gate": entry["gate"],
            **entry["time"],
        }
    )
    REPLAY.load(laps)
    benchmark.pedantic(lambda: None, rounds=len(laps))
