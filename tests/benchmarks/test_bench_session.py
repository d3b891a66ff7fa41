"""Measuring processes end when they should, and a run says what it had no time for."""

import signal
import time
from pathlib import Path

import pytest

from benchmarks import run as runs
from benchmarks.cases import Case
from benchmarks.session import DEFAULT, TUNED, TUNING, OutOfTime, Session, Worker, WorkerFailed

CASE = Case(objective="kd", rows=2, classes=3, dtype="fp32")
PATIENCE = 300.0
"""Seconds in which a worker has surely begun, or ended: it imports torch, perhaps beside much else."""


def request(**changes: object) -> dict[str, object]:
    base = {"case": CASE.to_dict(), "device": "cpu", "settings": [], "autotune": False}
    base |= {"seconds": 0.0, "excluded": {}, "most_bytes": None}
    return base | changes


def test_a_worker_answers_fails_and_is_given_up() -> None:
    worker = Worker(TUNING, "cpu")
    try:
        refused = worker.ask(
            request(case={"objective": "unknown", "rows": 2, "classes": 3, "dtype": "fp32"}), None, PATIENCE
        )
        assert "KeyError" in refused["error"]
        environment = Path(f"/proc/{worker.pid}/environ")
        if environment.exists():
            assert b"MALLOC_MMAP_MAX_=0" in environment.read_bytes().split(b"\0")
        with pytest.raises(OutOfTime):
            worker.ask(request(), time.monotonic(), PATIENCE)
    finally:
        worker.close()
    assert worker._process.returncode == -signal.SIGKILL


def test_a_worker_ends_with_its_session() -> None:
    """A session that is killed closes nothing: the end of its pipe must do."""
    worker = Worker({}, "cpu")
    worker.ask(request(case={"objective": "unknown", "rows": 2, "classes": 3, "dtype": "fp32"}), None, PATIENCE)
    assert worker._process.stdin is not None
    worker._process.stdin.close()
    assert worker._process.wait(timeout=PATIENCE) == 0
    worker.close()


def test_a_worker_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    worker = Worker({}, "cpu")
    try:
        with pytest.raises(WorkerFailed, match="ended with status"):
            worker.ask(request(), None, PATIENCE)
    finally:
        worker.close()


def test_both_allocators_are_measured_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("cpu")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert session.settings(CASE) == [DEFAULT, TUNED]
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert session.settings(CASE) == [DEFAULT]


def test_no_case_starts_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Case] = []

    def measure(self: Session, case: Case, *, autotune: bool) -> list[dict[str, object]]:
        assert not autotune
        measured.append(case)
        return [{"setting": DEFAULT, "laps_s": {}, "case": case.to_dict()}]

    monkeypatch.setattr(Session, "measure", measure)
    with runs.Run("cpu", full=False, minutes=(1.0, 2.0)) as run:
        first, second = run.cases[:2]
        assert run.measure(first) is run.measure(first)
        later = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: later)
        for _ in range(2):
            with pytest.raises(OutOfTime):
                run.measure(second)
        assert run.measure(first)
    assert measured == [first]
    assert run.left_out()[-1] == f"for want of time (no case starts after 1 minutes): {second.title}"
    assert len(run.records) == 1


def test_full_leaves_nothing_out() -> None:
    with runs.Run("cpu", full=True, minutes=None) as run:
        assert run.left_out() == []
        assert all(run.autotuned(case) for case in run.cases)
