"""A report measures what decides targets first, whatever its checks take; what fails or has no time is a line in it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_records import record

from benchmarks import cases, checks, cuda, densenet, machine, report, step, tables
from benchmarks import run as runs
from benchmarks.cases import Case
from benchmarks.harness import TIME_OVER
from benchmarks.session import OutOfTime, Session, WorkerFailed

DESCRIBED = {
    "device": "cuda",
    "machine": {"cores": 2, "threads": 2, "vector": "", "l3": "", "libc": "", "gpu": {"name": "Card Y"}},
    "versions": {"torch": "9.9"},
    "source": {"commit": "0123456789", "dirty": False},
    "date": "2025-01-02",
    "load_at_start": 0.1,
}
PASSED = "tests/a.py::test_one[kd, rows] PASSED [ 50%]\ntests/a.py::test_two SKIPPED (why) [100%]\n== 1 passed ==\n"
Command = Callable[[list[str], float], subprocess.CompletedProcess[str]]


def a_step(case: Any, device: str, timeout: float | None = None) -> dict[str, Any]:
    return {"case": asdict(case), "images": "random images", "trainers": {}}


def a_densenet(case: Any, device: str, timeout: float | None = None) -> dict[str, Any]:
    return {"case": asdict(case), "providers": {}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the report as on a machine with a GPU: its exit status, its results file and the tables."""
    page = tmp_path / "README.md"
    page.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    monkeypatch.setattr(runs, "device", lambda: "cuda")
    monkeypatch.setitem(report.MINUTES, "cuda", 600.0)  # nothing is left out where this machine is slow
    monkeypatch.setattr(machine, "describe", lambda device, commit: DESCRIBED)
    monkeypatch.setattr(report, "rewrite", lambda: tables.rewrite(page, tables.all_pages(tables.load(tmp_path))))
    monkeypatch.setattr(step, "measure_apart", a_step)
    monkeypatch.setattr(densenet, "measure", a_densenet)

    def make(commands: Command, several: Callable[..., Any]) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(checks, "_run", commands)
        monkeypatch.setattr(Session, "measure", lambda self, case, *, autotune: several(case))
        status = report.main([str(tmp_path)])
        (file,) = tmp_path.glob("*.json")
        return status, json.loads(file.read_text()), page.read_text()

    return make


def passing(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 0, PASSED)


def measured(case: Case) -> list[dict[str, Any]]:
    return [record(cuda.PLAIN) | {"case": case.to_dict(), "laps_s": {}}]


class Clock:
    """A clock that only what is measured or waited for turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._lock = threading.Lock()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def pass_until(self, moment: float) -> None:
        with self._lock:
            self.now = max(self.now, moment)


Spans = dict[str, list[tuple[float, float]]]
"""When each kind of measurement began, and until when it might have gone on."""


@pytest.fixture
def hurried(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Spans, dict[str, Any], Clock]]:
    """A GPU's report in its minutes: what measures takes all the time that it is given, what checks such a part."""
    monkeypatch.undo()

    def make(part: float, *options: str, losses: float = 1.0) -> tuple[Spans, dict[str, Any], Clock]:
        clock, spans = Clock(monkeypatch), {"losses": [], "densenets": [], "steps": []}
        monkeypatch.setattr(runs, "device", lambda: "cuda")
        monkeypatch.setattr(machine, "describe", lambda device, commit: DESCRIBED)
        monkeypatch.setattr(report, "rewrite", lambda: None)
        monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}")
        monkeypatch.setattr("os.cpu_count", lambda: 1)

        def command(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
            clock.pass_until(clock.now + part * limit)
            if part == 1 and "setup.py" not in command:
                raise subprocess.TimeoutExpired(command, limit, PASSED)
            return subprocess.CompletedProcess(command, 0, PASSED)

        def loss(self: Session, case: Case, *, autotune: bool) -> list[dict[str, Any]]:
            assert self.ends is not None
            spans["losses"].append((clock.now, self.ends))
            clock.pass_until(clock.now + losses * (self.ends - clock.now))
            if losses == 1:
                raise OutOfTime
            return measured(case)

        def other(kind: str) -> Callable[..., dict[str, Any]]:
            def measure(case: Any, device: str, timeout: float) -> dict[str, Any]:
                spans[kind].append((clock.now, clock.now + timeout))
                clock.pass_until(clock.now + timeout)
                raise subprocess.TimeoutExpired("python", timeout)

            return measure

        monkeypatch.setattr(checks, "_run", command)
        monkeypatch.setattr(Session, "measure", loss)
        monkeypatch.setattr(step, "measure_apart", other("steps"))
        monkeypatch.setattr(densenet, "measure", other("densenets"))
        assert report.main([str(tmp_path), *options]) == 0  # whoever had no time has not failed
        (file,) = tmp_path.glob("*.json")
        return spans, json.loads(file.read_text()), clock

    return make


@pytest.mark.parametrize("part", [1.0, 0.5, 0.01])
def test_targets_are_measured_whatever_the_checks_take(part: float, hurried: Any) -> None:
    """Losses begin within 195 s and have 165 at least, then a DenseNet 75 and whole steps 90; it ends in time."""
    spans, _, clock = hurried(part)
    begin, end = spans["losses"][0]
    assert begin <= 195
    assert end - begin >= 165
    begin, end = spans["densenets"][0]
    assert end - begin >= 75
    assert spans["steps"][-1][1] - spans["steps"][0][0] >= 90
    assert spans["densenets"][0][0] < spans["steps"][0][0]
    assert clock.now <= 8.75 * 60


def test_what_nobody_needs_is_the_next_one_s(hurried: Any) -> None:
    """Checks and losses that are done at once leave their seconds to a DenseNet and whole steps, those to the rest."""
    spans, results, clock = hurried(0.001, losses=0.001)
    begin, end = spans["densenets"][0]
    assert end - begin > 400
    assert len(results["records"]) == len(cases.targets("cuda"))  # then a DenseNet and steps took what there was
    assert clock.now <= 8.75 * 60
    assert {each["name"] for each in results["checks"] if not each["done"]} >= {"GPU tests, the others", "memcheck"}


def test_reserves_follow_the_minutes(hurried: Any) -> None:
    assert sum((*report.BEFORE.values(), *report.RESERVED.values())) == 8.75 * 60 == 60 * report.MINUTES["cuda"]
    spans, _, clock = hurried(1.0, "--minutes", "5.25", "--no-build")
    begin, end = spans["losses"][0]
    assert begin == pytest.approx(0.6 * 75)
    assert end - begin == pytest.approx(0.6 * (165 + 120))
    assert clock.now <= 5.25 * 60


def test_every_case_of_steps_has_a_turn() -> None:
    """The first has what is left but for the least of those after it."""
    given: list[float | None] = []

    def call(timeout: float | None) -> dict[str, Any]:
        given.append(timeout)
        return {}

    now = time.monotonic()
    report._each([("one", call), ("two", call), ("three", call)], [], now + 200, lambda: None, 45.0)
    assert given == [pytest.approx(110, abs=5), pytest.approx(155, abs=5), pytest.approx(200, abs=5)]
    report._each([("one", call)], [], float("inf"), lambda: None, 45.0)
    assert given[-1] is None
    (late,) = report._each([("one", call)], [], time.monotonic() + 44, lambda: None, 45.0)
    assert (late["outcome"], late["passed"], late["done"]) == (TIME_OVER, True, False)


def test_who_is_missing_in_a_case_is_named() -> None:
    left_out = {"failed": "left out: not ready within 9 s"}
    whole = {"failed": None}
    made = {"trainers": {"a": whole, "b": left_out}}
    kept = {"providers": {"c": whole | {"memory_failed": TIME_OVER}, "d": {"failed": "OutOfMemoryError: no room"}}}
    found = report._each(
        [("one", lambda timeout: made), ("two", lambda timeout: kept)], [], float("inf"), lambda: None, 45.0
    )
    assert [each["outcome"] for each in found] == ["left out in part: b", "left out in part: memory of c"]
    assert [(each["passed"], each["done"]) for each in found] == [(True, False)] * 2


def test_max_autotune_waits_until_all_targets_have_a_time(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may then replace a record; where it fails, what there was stays."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    asked: list[tuple[Case, bool]] = []
    targets = cases.targets("cuda")

    def measure(self: Session, case: Case, *, autotune: bool) -> list[dict[str, Any]]:
        asked.append((case, autotune))
        if autotune and case == targets[1]:
            raise WorkerFailed("max-autotune")
        if autotune and case == targets[2]:
            raise OutOfTime
        return [each | {"with": autotune} for each in measured(case)]

    monkeypatch.setattr(runs.Run, "cases", targets)
    with runs.Run("cuda", full=True, minutes=None, postponed=True) as run:
        monkeypatch.setattr(Session, "measure", measure)
        report.measure_cases(run, run.cases, lambda: None)
        report.autotune(run, lambda: None)
        assert asked == [(case, False) for case in targets] + [(case, True) for case in targets[:4]]
        assert [each["with"] for each in run.records] == [True, False, False, True] + [False] * (len(targets) - 4)
        assert [each["case"] for each in run.records] == [case.to_dict() for case in targets]
        assert run.retried == [targets[0], targets[3]]
        taken = f"torch.compile with max-autotune, but for {targets[0].title}, but for {targets[3].title}"
        assert taken in run.left_out()
        assert not run.failures


def test_tests_tell_failed_from_not_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = iter(
        [
            subprocess.CompletedProcess([], 0, PASSED),
            subprocess.CompletedProcess([], checks.NO_TESTS, "== no tests ran ==\n"),
            subprocess.TimeoutExpired([], 60, PASSED + "tests/b.py::test_three "),
            subprocess.TimeoutExpired([], 60, PASSED + "tests/b.py::test_three[a b] FAILED [ 9%]\n"),
            subprocess.CompletedProcess([], 1, PASSED + "tests/c.py::test_four ERROR\n== 1 error ==\n"),
            subprocess.CompletedProcess([], 4, "ERROR: file or directory not found: tests/d.py\n"),
        ]
    )

    def run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "tests"
        answer = next(outputs)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(checks, "_run", run)
    monkeypatch.setattr("os.cpu_count", lambda: 1)

    def found(parts: int) -> tuple[str, bool, bool]:
        each = checks.tests("T", [("tests",)] * parts, 60, float("inf"))
        return each["outcome"].replace("59 s", "60 s"), each["passed"], each["done"]

    assert found(2) == ("passed, 0 s (1 passed, 1 skipped)", True, True)
    assert found(1) == ("not done within 60 s, 1 of 1 parts (1 passed, 1 skipped)", True, False)
    failing = "failed: tests/b.py::test_three[a b], tests/c.py::test_four; not done within 60 s, 1 of 2 parts"
    assert found(2) == (f"{failing} (1 error, 1 failed, 2 passed, 2 skipped)", False, False)
    assert found(1) == ("status 4: ERROR: file or directory not found: tests/d.py (no test)", False, True)
    assert checks.tests("T", [("tests",)], 60, time.monotonic() + 5)["outcome"] == TIME_OVER
    assert "test_three[a b] FAILED" in capsys.readouterr().err


def test_the_other_tests_are_all_but_the_first() -> None:
    rest = checks.rest()
    files = {arguments[0] for arguments in rest}
    assert checks.DENSE not in files
    assert "tests/backends/triton/contract/test_triton_kd.py" in files
    assert rest[0][0] == "tests"
    assert all((checks.ROOT / file).exists() for file in files | {arguments[0] for arguments in checks.FIRST})


def test_half_a_build_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, limit, "")

    monkeypatch.setattr(checks, "_run", late)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert not checks.build()["passed"]


@pytest.mark.parametrize("compiler", [None, "/cuda/bin/nvcc"])
@pytest.mark.parametrize(("asked", "wanted"), [(None, ["BAN_FAST_CUDA_ARCHS=90"]), ("80", [])])
def test_on_a_gpu_it_builds_for_that_one(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, wanted: list[str], compiler: str | None
) -> None:
    """Unless the environment says for which; and where there is a compiler, not without it."""
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    commands: list[list[str]] = []

    def built(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(checks, "_run", built)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("BAN_FAST_CUDA_ARCHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("BAN_FAST_CUDA_ARCHS", asked)
    assert checks.build()["passed"]
    start = commands[0].index(sys.executable)
    assert commands[0][:start] == ["env", *(["BAN_FAST_CUDA=on"] if compiler else []), *wanted]


def test_a_run_in_which_all_goes_well(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, results, page = gpu(passing, measured)
    assert status == 0
    assert results["complete"]
    assert {each["name"]: (each["passed"], each["done"]) for each in results["checks"]} == {
        "build": (True, True),
        "GPU tests, the first": (True, True),
        "GPU tests, the others": (True, True),
        "memcheck": (True, False),
        "racecheck": (True, False),
    }
    assert "- memcheck: compute-sanitizer is not installed" in page
    assert "2 passed, 2 skipped" in page
    assert len(results["records"]) == len(runs.Run("cuda", full=True, minutes=None).cases)
    assert len(results["steps"]) == len(step.cases("cuda"))
    assert "Failed" not in page


def test_a_run_in_which_everything_fails(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}")

    def commands(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        if "racecheck" in command:
            raise OSError("no such file")
        if "memcheck" in command:
            raise subprocess.TimeoutExpired(command, limit, "triton: 2 shapes\n")
        return subprocess.CompletedProcess(command, 1, "tests/a.py::test_one FAILED\n1 failed in 3 s\n")

    def several(case: Case) -> list[dict[str, Any]]:
        if case.objective == "kd":
            raise WorkerFailed("cuda: CUDA out of memory")
        if case.objective == "dkpp":
            raise OutOfTime
        return measured(case)

    status, results, page = gpu(commands, several)
    assert status == 1
    assert [each["passed"] for each in results["checks"]] == [False] * 4 + [True, False]
    for line in (
        "- GPU tests, the first: failed: tests/a.py::test_one",
        "- memcheck: not done within 60 s (triton: 2 shapes)",
        "- racecheck: could not be started: no such file",
        "- KD [8192, 128256] bf16, random logits: cuda: CUDA out of memory",
        "- for want of time",
        "| CWTM, confidence known [8192, 128256] bf16",
        "not measured yet",
    ):
        assert line in page, line
    assert {each["case"]["objective"] for each in results["records"]} == {"kd_labels", "cwtm", "cwtm_confidence"}


def test_a_run_that_is_killed_leaves_what_it_had(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    count = iter(range(10))

    def killed(case: Case) -> list[dict[str, Any]]:
        if next(count) == 3:
            raise SystemExit("killed")
        return measured(case)

    with pytest.raises(SystemExit):
        gpu(passing, killed)
    (results,) = tables.load(tmp_path)
    assert not results["complete"]
    assert len(results["records"]) == 3
    assert "The run was cut short." in tables.all_pages([results])


def test_checks_end_in_time_with_their_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun, communicate = tmp_path / "begun", subprocess.Popen.communicate

    def once_begun(process: subprocess.Popen[str], timeout: float | None = None) -> tuple[str, str]:
        """The time runs when the command has said something: a busy machine may take seconds to start it."""
        while timeout is not None and process.poll() is None and not begun.exists():
            time.sleep(0.01)
        return communicate(process, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", once_begun)
    code = "import pathlib, subprocess, sys; print('so far', flush=True); pathlib.Path(sys.argv[1]).touch(); "
    code += "subprocess.run(['sleep', '60'])"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        checks._run([sys.executable, "-c", code, str(begun)], 0.1)
    assert checks._last(caught.value.output) == "so far"
    assert checks.check("build", ["true"], ends=0.0) == {
        "name": "build",
        "passed": True,
        "done": False,
        "outcome": TIME_OVER,
    }
