"""The whole-step benchmark: all do the same work, shares are of a whole, targets are judged by rounds."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import bench_records
import pytest
import torch
from torch import Tensor

from benchmarks import machine, report, step, step_figures, tables, targets, trainers
from benchmarks.step_figures import CACHED, COMPILED, COMPOSED, LIVE, NAIVE, SUPERVISED, Case, Record

SMALL, CPU = Case("wrn-10-1", 4), torch.device("cpu")


@pytest.fixture(scope="module")
def record() -> Record:
    everyone = trainers.trainers
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BAN_FAST_DATA", raising=False)
        patch.setattr(
            step,
            "trainers",
            lambda device: {k: v for k, v in everyone(device).items() if k not in (COMPOSED, COMPILED)},
        )
        return step.measure(SMALL, "cpu", rounds=2)


def test_all_have_times_of_the_right_gradient(record: Record) -> None:
    assert list(record["trainers"]) == [NAIVE, LIVE, CACHED, SUPERVISED]
    assert record["images"] == "random images"
    for name, entry in record["trainers"].items():
        assert entry["failed"] is None, entry["failed"]
        assert len(entry["laps_s"]) == 2
        assert sum(entry["shares"].values()) == pytest.approx(1)
        assert min(entry["shares"].values()) > 0
        assert (entry["off"] is None) if name == SUPERVISED else (entry["off"] <= step.LIMITS["cpu"])
    assert "| ours, teacher cached | " in step_figures.table(record)


def test_parts_are_timed_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the parts turn: two batches, the loader's end included."""
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Turned:
        device = CPU

        def batches(self) -> Iterator[SimpleNamespace]:
            for _ in range(2):
                passes(1.0)
                yield SimpleNamespace(images=torch.ones(2, 3))
            passes(0.5)

        def teach(self, batch: SimpleNamespace) -> None:
            passes(10.0)

        def forward(self, images: Tensor) -> Tensor:
            passes(100.0)
            return images.clone().requires_grad_() * 1

        def loss(self, logits: Tensor, taught: None, batch: SimpleNamespace) -> Tensor:
            passes(1000.0)
            return logits.sum()

        def update(self) -> None:
            passes(50.0)

    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: now))
    spent = step.parts(Turned())  # type: ignore[arg-type]
    assert spent == {"loader": 2.5, "teacher": 20.0, "student": 300.0, "loss": 2000.0}


@pytest.mark.slow
def test_only_a_live_teacher_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shares tell apart, once the cache knows an epoch's views."""
    split, _ = step.images(8)
    asked = {}
    for name in (LIVE, CACHED, SUPERVISED):
        trainer = trainers.trainers(CPU)[name](SMALL, split, CPU)
        trainer.epoch()
        batches: list[Tensor] = []
        if trainer._teacher is not None:
            logits = trainer._teacher.logits

            def recorded(images: Tensor, of: Callable[[Tensor], Tensor] = logits, to: list[Tensor] = batches) -> Tensor:
                to.append(images)
                return of(images)

            monkeypatch.setattr(trainer._teacher, "logits", recorded)
        trainer.epoch()
        asked[name] = len(batches)
    assert asked == {LIVE: 2, CACHED: 0, SUPERVISED: 0}


@pytest.mark.parametrize("name", [LIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in (NAIVE, CACHED))])
def test_an_epoch_updates_once_a_batch(name: str) -> None:
    split, _ = step.images(12)
    trainer = trainers.trainers(torch.device("cpu"))[name](SMALL, split, torch.device("cpu"))
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    taught = [parameter.clone() for parameter in trainer.teacher_network.parameters()]
    norm = next(module for module in trainer.network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    trainer.epoch()
    assert norm.num_batches_tracked == 3
    assert all(not torch.equal(new, old) for new, old in zip(trainer.network.parameters(), before, strict=True))
    assert all(torch.equal(new, old) for new, old in zip(trainer.teacher_network.parameters(), taught, strict=True))
    assert sum(len(batch.labels) for batch in trainer.batches()) == 12


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAN_FAST_DATA", raising=False)

    class Wrong(trainers.Ours):
        def loss(self, logits, taught, batch):
            return 2 * super().loss(logits, taught, batch)

    class Broken(trainers.Ours):
        def teach(self, batch):
            raise RuntimeError("no teacher\nat all")

    monkeypatch.setattr(step, "trainers", lambda device: {"wrong": Wrong, "broken": Broken})
    found = step.measure(SMALL, "cpu", rounds=1)
    assert found["trainers"]["wrong"]["off"] == pytest.approx(1)
    assert found["trainers"]["wrong"]["laps_s"] == []
    assert found["trainers"]["broken"]["failed"] == "RuntimeError: no teacher"
    lines = step_figures.table(found).splitlines()
    assert lines[-2].startswith("| wrong | no time |")
    assert lines[-1].startswith("| broken | RuntimeError: no teacher |")


@pytest.mark.parametrize(
    ("device", "lap", "rounds"),
    [
        ("cpu", 2.0, 10),
        ("cpu", 30.0, 7),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("cpu", 0.1, 41), ("cuda", 2.0, 7))),
    ],
)
def test_rounds_fill_a_minute_on_a_cpu(device: str, lap: float, rounds: int, made: dict[str, Any]) -> None:
    """Three trainers of so many seconds an epoch; on a GPU seven rounds do."""
    made |= {"a": lap, "b": lap, COMPOSED: lap}
    found = step.measure(SMALL, device)
    assert {len(entry["laps_s"]) for entry in found["trainers"].values()} == {rounds}
    assert {len(entry["laps_s"]) for entry in step.measure(SMALL, device, rounds=2)["trainers"].values()} == {2}


def test_who_is_compiled_is_built_last_and_in_the_time_that_is_left(made: dict[str, Any]) -> None:
    """The others keep theirs, and what time they need for their rounds."""
    made |= {COMPOSED: "slow to build", "a": 1.0, "b": 1.0}
    found = step.measure(SMALL, "cpu", ends=100.0)
    limits = made["limits"]
    assert limits[0] == pytest.approx(100.0)
    # 100 s less 4 of warm-ups, and three rounds and three times the shares of the two, and of one more.
    assert limits[2] == pytest.approx(100 - 4 - 9 * 3)
    assert list(found["trainers"]) == [COMPOSED, "a", "b"]
    assert found["trainers"][COMPOSED]["failed"] == "left out: not ready within 69 s"
    assert [len(entry["laps_s"]) for entry in found["trainers"].values()] == [0, 7, 7]


def test_rounds_end_in_time(made: dict[str, Any]) -> None:
    made |= {"a": 2.0, "b": 3.0}
    found = step.measure(SMALL, "cpu", ends=65.0)  # 10 of warm-ups, 30 for shares
    assert {len(entry["laps_s"]) for entry in found["trainers"].values()} == {5}
    assert {len(entry["laps_s"]) for entry in step.measure(SMALL, "cpu", ends=1.0)["trainers"].values()} == {3}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Trainers to be told of: seconds of an epoch by name, on a clock that only they turn. Their limits are noted."""
    told: dict[str, Any] = {}
    now, limits = [0.0], []

    class Made:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, CPU
            if told[name] == "slow to build":
                now[0] += limits[-1]
                raise step.TookTooLong

        def epoch(self) -> None:
            now[0] += told[self.name]

    @contextmanager
    def noted(seconds: float | None) -> Iterator[None]:
        limits.append(seconds)
        told["limits"] = limits
        yield

    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(step, "time_limit", noted)
    monkeypatch.setattr(step, "gradient_off", lambda trainer: 0.0)
    monkeypatch.setattr(step, "_wait", lambda trainer: None)
    monkeypatch.setattr(step, "parts", lambda trainer: dict.fromkeys(step.PARTS, 1.0))
    monkeypatch.setitem(step.WARM_UPS, "cuda", 2)
    names = lambda device: {name: partial(_made, Made, name) for name in told if name != "limits"}  # noqa: E731
    monkeypatch.setattr(step, "trainers", names)
    return told


def _made(make: Callable[[str], Any], name: str, *_: object) -> Any:
    return make(name)


def test_targets_are_judged_round_by_round() -> None:
    shares = {"loader": 0.01, "loss": 0.015, "teacher": 0.005, "student": 0.97}

    def entry(*laps: float) -> Record:
        return {"off": None, "failed": None, "laps_s": list(laps), "shares": shares}

    # The machine slowed down twofold in the second round, for both.
    steps = [{"case": {"network": "wrn-16-1", "batch": 32}, "trainers": {CACHED: entry(1.02, 2.04, 1.03)}}]
    steps[0]["trainers"][SUPERVISED] = entry(1.0, 2.0, 1.0)
    judged = targets.judge({"device": "cpu", "records": [], "steps": steps})
    found = {verdict.target.what: verdict for verdict in judged if verdict.value is not None}
    ratio, share = found.values()
    assert "wrn-16-1" in ratio.target.what
    assert ratio.value == pytest.approx(1.02)
    assert ratio.met
    assert share.value == pytest.approx(2.5)
    assert share.met
    assert all("step" in what for what in found)


def test_a_report_goes_on_without_what_fails_or_has_no_time(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    answers = iter([record, subprocess.CalledProcessError(1, "python"), subprocess.TimeoutExpired("python", 1)])

    def measured(case: Case, device: str, **_: Any) -> Record:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(step, "measure_apart", measured)
    monkeypatch.setattr(step, "cases", lambda device: [SMALL] * 3)
    steps: list[Record] = []
    saved: list[int] = []
    failed = report.measure_steps("cpu", steps, math.inf, lambda: saved.append(len(steps)))
    assert steps == [record]
    assert saved == [1, 1, 1]
    assert [each["passed"] for each in failed] == [False, True]
    assert "status 1" in failed[0]["outcome"]
    (late,) = report.measure_steps("cpu", steps, time.monotonic() + 1, lambda: None)[:1]
    assert "the run's time was over" in late["outcome"]


def test_steps_and_loaders_are_in_the_tables(record: Record) -> None:
    loaded = {"images_per_s": {"memory": 3000}, "absent": {}, "targets": []}
    page = tables.all_pages([bench_records.results() | {"steps": [record], "loaders": loaded}])
    assert "#### Whole training steps\n\nwrn-10-1, batch 4, random images" in page
    assert "#### Loaders alone" in page


@pytest.mark.slow
def test_command_line(tmp_path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.step", "--network", SMALL.network, "--batch", "4", "--rounds", "2"]
    done = subprocess.run([*command, "--json", str(path)], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert "wrn-10-1, batch 4" in done.stdout
    (record,) = json.loads(path.read_text())["steps"]
    assert list(record["trainers"]) == [NAIVE, COMPOSED, LIVE, CACHED, COMPILED, SUPERVISED]
    assert all(len(entry["laps_s"]) == 2 for entry in record["trainers"].values())
