"""How a machine is shared out."""

import math
from pathlib import Path
from typing import Any

import pytest

from ban_fast.data.folder import cores
from ban_fast.errors import UserError
from ban_fast.studies import worker
from ban_fast.studies.resources import Resources, Slot, local_slots, threads_asked


def slots(cores: int = 8, gpus: int = 0, threads: int | None = None, **asked: float) -> list[Slot]:
    return local_slots(Resources(**asked), cores, [f"g{number}" for number in range(gpus)], threads)


@pytest.mark.parametrize(
    ("asked", "count", "threads"),
    [
        ({}, 8, 1),
        ({"workers": 3}, 3, 2),
        ({"workers": 20}, 20, 1),
        ({"cpus_per_run": 4.0}, 2, 4),
        ({"cpus_per_run": 2.9}, 2, 2),
        ({"cpus_per_run": 0.5}, 16, 1),
        ({"cpus_per_run": 99.0}, 1, 99),
        ({"workers": 3, "cpus_per_run": 1.0}, 3, 1),
    ],
)
def test_cores(asked: dict[str, float], count: int, threads: int) -> None:
    assert slots(**asked) == [Slot(threads=threads, gpus=None)] * count


def test_threads_that_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS is a limit, which --cpus-per-run overrides."""
    assert {slot.threads for slot in slots(threads=1, workers=2)} == {1}
    assert {slot.threads for slot in slots(threads=6, workers=2)} == {4}
    assert {slot.threads for slot in slots(threads=1, workers=2, cpus_per_run=3.0)} == {3}
    for text, threads in (("4", 4), ("0", None), ("", None), ("4,2", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads_asked() == threads
    assert 1 <= cores() <= 4096


@pytest.mark.parametrize(
    ("asked", "gpus", "given"),
    [
        ({}, 2, [("g0",), ("g1",)]),
        ({"workers": 1}, 2, [("g0",)]),
        ({"workers": 4}, 2, [("g0",), ("g0",), ("g1",), ("g1",)]),
        ({"workers": 3}, 2, [("g0",), ("g0",), ("g1",)]),
        ({"gpus_per_run": 0.5}, 1, [("g0",), ("g0",)]),
        ({"gpus_per_run": 0.4}, 1, [("g0",), ("g0",)]),
        ({"gpus_per_run": 0.1}, 1, [("g0",)] * 10),
        ({"gpus_per_run": 2.0}, 5, [("g0", "g1"), ("g2", "g3")]),
        ({"gpus_per_run": 0.0, "workers": 2}, 2, [None, None]),
    ],
)
def test_gpus(asked: dict[str, float], gpus: int, given: list[tuple[str, ...] | None]) -> None:
    assert [slot.gpus for slot in slots(gpus=gpus, **asked)] == given


@pytest.mark.parametrize(
    ("asked", "gpus", "words"),
    [
        ({"workers": 0}, 0, "--workers must be at least 1, got 0"),
        ({"cpus_per_run": 0.0}, 0, "--cpus-per-run must be a number above 0, got 0.0"),
        ({"cpus_per_run": math.inf}, 0, "--cpus-per-run must be a number above 0, got inf"),
        ({"gpus_per_run": 1.5}, 2, "--gpus-per-run must be a whole number, or a share of one GPU below 1, got 1.5"),
        ({"gpus_per_run": math.nan}, 2, "--gpus-per-run must be a whole number"),
        ({"gpus_per_run": 1.0}, 0, "--gpus-per-run is 1, but there are 0 GPUs"),
        ({"gpus_per_run": 4.0}, 2, "--gpus-per-run is 4, but there are 2 GPUs"),
        ({"gpus_per_run": 1.0, "workers": 3}, 2, "--workers is 3, but 2 GPUs have room for 2 runs of 1 each"),
    ],
)
def test_what_is_not_there(asked: dict[str, float], gpus: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        slots(gpus=gpus, **asked)
    assert words in str(caught.value)


def test_a_runs_process_is_none_of_a_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started who starts the study: a run that took itself for one of several would wait for the others."""
    found: dict[str, str] = {}

    def started(*_: Any, env: dict[str, str], **__: Any) -> None:
        found.update(env)

    monkeypatch.setattr(worker.subprocess, "Popen", started)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("ROLE_RANK", "TORCHELASTIC_RUN_ID", "RANKING"):
        monkeypatch.setenv(name, "1")
    worker.Worker(worker.Job.here(tmp_path, "run", 3, None))
    assert not [
        name
        for name in found
        if name.startswith(("RANK_", "WORLD", "LOCAL", "MASTER", "GROUP", "ROLE", "TORCHELASTIC"))
    ]
    assert "RANK" not in found
    assert (found["RANKING"], found["OMP_NUM_THREADS"]) == ("1", "3")
