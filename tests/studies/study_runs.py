"""Studies small enough for tests, their runs made one by one, and what two run directories must have in common."""

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from held_networks import held

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig
from ban_fast.studies import Outcome, Study, StudyObserver, StudyRun
from ban_fast.studies.worker import _START
from ban_fast.training import run


def small(**changes: Any) -> Config:
    """A teacher and a student on digits, with a checkpoint after each step; they can be held at work."""
    values: dict[str, Any] = {
        "data": DataConfig(name="digits", limit_train=96, limit_test=48),
        "model": ModelConfig(name="held_networks:Linear"),
        "optimizer": OptimizerConfig(lr=0.05),
        "generations": 1,
        "epochs": 6,
        "batch_size": 32,
        "device": "cpu",
        "checkpoint_seconds": 0.0,
    }
    return Config(**{**values, **changes})


def separately(study: Study, path: Path) -> None:
    """Every run of the study by itself, with a teacher of its own."""
    for planned in study.runs:
        run(dataclasses.replace(planned.config, checkpoint_seconds=1e9), out=path / planned.name)


def footprint(path: Path) -> dict[str, Any]:
    """Everything in a run directory but clocks' figures, checkpoints, what it ran on, and how its teachers were asked.

    A study's runs read what their teacher's run has put down, to the same bits.
    """
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
        elif name == "shared.json":
            continue
        elif name == "results.json":
            found[name] = _timeless(json.loads(file.read_text()))
            for record in found[name]["generations"]:
                record.pop("teacher", None)
        elif name == "environment.json" or file.suffix == ".pt" or file.is_dir():
            found[name] = "there"
        else:
            found[name] = _timeless(json.loads(file.read_text()))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        clocks = ("train_seconds", "images_per_second", "seconds", "checkpoint_seconds")
        return {key: _timeless(inner) for key, inner in value.items() if key not in clocks}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def footprints(study: Study, path: Path) -> dict[str, Any]:
    return {planned.name: footprint(path / planned.name) for planned in study.runs}


def workers(directory: Path) -> dict[str, int]:
    """Process ids of the runs of a study that are at work, by name."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            except OSError:  # it has just ended
                continue
            if words[2:4] == [_START, str(directory)]:
                found[words[4]] = int(process.name)
    return found


class Watch(threading.Thread):
    """Does something as soon as a condition holds. `join` raises what went wrong."""

    def __init__(self, condition: Callable[[], object], act: Callable[[], object] = bool) -> None:
        super().__init__()
        self._condition, self._act = condition, act
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        until = time.monotonic() + 600
        try:
            while not self._condition():
                assert time.monotonic() < until
                time.sleep(0.002)
            self._act()
        except BaseException as error:
            self._error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self._error is not None:
            raise self._error


def hold(directory: Path, *names: str) -> None:
    """Let these runs of a study of `small` ones wait at work, as soon as they are `at_work`."""
    for name in names:
        file = held(directory, name)
        file.parent.mkdir(exist_ok=True)
        file.touch()


def release(directory: Path, *names: str) -> None:
    """Let them go on."""
    for name in names:
        held(directory, name).unlink()


def at_work(directory: Path, *names: str) -> bool:
    """Whether all of these have a checkpoint of generation 1."""
    return all((directory / name / "generation-1" / "state.pt").exists() for name in names)


def kill_at_work(directory: Path, name: str, *, its_starter: bool = False) -> Watch:
    """SIGKILL for a run's process, or who started it, in the midst of generation 1. To be called before it begins."""

    def kill() -> None:
        try:
            process = workers(directory)[name]
            if its_starter:
                process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(process, signal.SIGKILL)
        finally:
            release(directory, name)

    hold(directory, name)
    return Watch(lambda: at_work(directory, name), kill)


def asked(directory: Path, study: Study) -> dict[str, tuple[str, int]]:
    """How each student of a study had its teacher in generation 1: the mode, and the images shown for it."""
    found = {}
    for planned in study.runs:
        if planned.config.generations:
            record = json.loads((directory / planned.name / "results.json").read_text())["generations"][1]["teacher"]
            found[planned.name] = (record["mode"], record["forward_images"])
    return found


class Heard(StudyObserver):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.before: frozenset[str] = frozenset()
        self.started: list[tuple[str, int]] = []
        self.ended: list[tuple[str, str, bool]] = []
        self.texts: dict[str, str] = {}
        self.notes: list[str] = []

    def study_started(self, study: Study, finished: frozenset[str]) -> None:
        self.before = finished

    def run_started(self, run: StudyRun, attempt: int) -> None:
        self.started.append((run.name, attempt))

    def run_ended(self, run: StudyRun, outcome: Outcome, again: bool) -> None:
        self.ended.append((run.name, outcome.kind, again))
        self.texts[run.name] = outcome.text
        self.notes += outcome.notes
