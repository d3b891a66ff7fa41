"""`python -m benchmarks.report [DIR]`: all this machine can run, into one results file, and the tables made of them.

On a GPU in under nine minutes, in the order of weight: the build, a short check, the cases that decide targets, then
the other tests, compute-sanitizer and the other cases as far as time goes. What fails is a line in the results, and the
rest goes on; the file is written anew after every step, so that a run that is killed leaves what it had.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cases, checks, densenet, densenet_figures, machine, step, step_figures, tables
from benchmarks import run as runs
from benchmarks.cases import Case
from benchmarks.checks import ROOT, Check, outcome
from benchmarks.figures import Figures
from benchmarks.harness import TIME_OVER
from benchmarks.run import Run
from benchmarks.session import OutOfTime, WorkerFailed

RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = {"cpu": math.inf, "cuda": 8.75}
LOSSES = 0.5
"""Of a CPU's time for measuring, where it is limited: whole steps, loaders and DenseNets come after the losses."""
BEFORE = {"build": 120.0, "short check": 75.0}
"""Seconds of a GPU's report, at most, before anything is measured."""
RESERVED = {"losses": 165.0, "densenets": 75.0, "steps": 90.0}
"""Then these in turn, at least, for the cases of targets: nobody's seconds go to what comes earlier. What is left of
anyone's goes to the next, and in the end to the rest. Together they are 8.75 minutes, and follow --minutes."""
CASE_SECONDS = {"cpu": 60.0, "cuda": 45.0}
"""A case of whole steps or of DenseNets, its networks being compiled, would not be done in less."""
WIND_UP = 5.0
"""No case of the losses starts later before its time is over: it could not be done."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument("--tables", action="store_true", help="measure nothing: only rewrite the tables")
    parser.add_argument("--commit", help="the commit measured, where the checkout has no .git that says so")
    parser.add_argument("--minutes", type=float, help="end by then, the targets measured first (on a GPU: 8.75)")
    parser.add_argument("--no-build", action="store_true", help="measure the extension that is installed")
    options = parser.parse_args(arguments)
    failed = False
    if not options.tables:
        failed = measure(options.directory, options.commit, options.minutes, builds=not options.no_build)
    rewrite()
    return int(failed)


def rewrite() -> None:
    """The tables of README.md and benchmarks/README.md from benchmarks/results, wherever this run's file went."""
    found = tables.load(RESULTS)
    for path, text in (
        (ROOT / "README.md", tables.front_page(found)),
        (Path(__file__).with_name("README.md"), tables.all_pages(found)),
    ):
        done = tables.rewrite(path, text)
        print(f"{path.relative_to(ROOT)}: " + ("tables rewritten" if done else f"has no {tables.BEGIN}, left alone"))


def measure(directory: Path, commit: str | None, minutes: float | None, *, builds: bool = True) -> bool:
    """Measure, and write the results file; whether a check or a measurement failed."""
    device = runs.device()
    seconds = 60 * (MINUTES[device] if minutes is None else minutes)
    ends = time.monotonic() + seconds
    report = Report(device, directory, machine.describe(device, commit), seconds, ends)
    print(tables.caption(report.described | {"complete": True}))
    (on_gpu if device == "cuda" else on_cpu)(report, builds=builds)
    report.save(complete=True)
    print(f"wrote {report.path}")
    results = json.loads(report.path.read_text())
    figures = Figures(results["records"])
    print(tables.summary(figures, figures.cases()), *map(step_figures.table, report.steps), sep="\n\n")
    print("", *map(densenet_figures.table, report.densenets), sep="\n\n")
    print(f"\n{tables.target_table(results)}")
    failed = any(not each["passed"] for each in report.done)
    return failed or bool(report.run.failures) or _ours_failed(report.run.records)


class Report:
    """What a report has so far, and its file."""

    def __init__(self, device: str, directory: Path, described: dict[str, Any], seconds: float, ends: float) -> None:
        self.described, self.seconds, self.ends = described, seconds, ends
        self.path = directory / machine.file_name(described)
        self.done: list[Check] = []
        self.steps: list[dict[str, Any]] = []
        self.densenets: list[dict[str, Any]] = []
        self.loaders: dict[str, Any] | None = None
        self.run = Run(device, full=True, minutes=None, postponed=device == "cuda")

    def save(self, *, complete: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self.run.results(self.described, self.done, complete=complete)
        found |= {"steps": self.steps, "loaders": self.loaders, "densenets": self.densenets}
        machine.write(self.path, json.dumps(found, indent=1) + "\n")

    def add(self, *found: Check) -> None:
        self.done += found
        self.save()


def on_cpu(report: Report, *, builds: bool) -> None:
    """All cases, in the order of the losses, whole steps, loaders and DenseNets."""
    if builds:
        report.add(checks.build())
    left = LOSSES * (report.ends - time.monotonic()) / 60
    report.run = Run("cpu", full=True, minutes=None if left == math.inf else (left - 0.5, left))
    report.save()
    with report.run as run:
        measure_cases(run, run.cases, report.save)
        report.add(*measure_steps("cpu", report.steps, report.ends, report.save))
        found, report.loaders = measure_loaders(report.ends)
        report.add(found)
        report.add(*measure_densenets("cpu", report.densenets, report.ends, report.save))


def on_gpu(report: Report, *, builds: bool) -> None:
    """What decides targets within `RESERVED`, whatever came before took; then the rest."""
    unit = report.seconds / sum((*BEFORE.values(), *RESERVED.values()))
    densenets_end = report.ends - unit * RESERVED["steps"]
    losses_end = densenets_end - unit * RESERVED["densenets"]
    if builds:
        report.add(checks.build(unit * BEFORE["build"]))
    before = losses_end - unit * RESERVED["losses"]
    report.add(checks.tests("GPU tests, the first", checks.FIRST, unit * BEFORE["short check"], before))
    with report.run as run:
        run.until(losses_end - WIND_UP, losses_end)
        measure_cases(run, cases.targets("cuda"), report.save)
        autotune(run, report.save)
        report.add(*measure_densenets("cuda", report.densenets, densenets_end, report.save))
        judged = step.judged("cuda")
        report.add(*measure_steps("cuda", report.steps, report.ends, report.save, judged))
        report.add(checks.tests("GPU tests, the others", checks.rest(), checks.TEST_SECONDS, report.ends))
        report.add(*checks.sanitize(report.ends))
        others = [case for case in step.cases("cuda") if case not in judged]
        report.add(*measure_steps("cuda", report.steps, report.ends, report.save, others))
        run.until(report.ends - WIND_UP, report.ends)
        measure_cases(run, run.cases, report.save)


def measure_cases(run: Run, several: Sequence[Case], save: Callable[[], None]) -> None:
    """Cases of the losses; those that cannot be measured are the run's failures, or left out."""
    for case in several:
        _turn(case, run.measure, save)


def autotune(run: Run, save: Callable[[], None]) -> None:
    """The cases where max-autotune decides a target, again; what fails or has no time leaves what there was."""
    for case in cases.autotuned():
        if case not in run.failures:
            _turn(case, run.autotune, save)


def _turn(case: Case, measure: Callable[[Case], object], save: Callable[[], None]) -> None:
    start = time.monotonic()
    try:
        measure(case)
    except OutOfTime:
        return
    except WorkerFailed as error:
        print(f"{case.title}: {error}", file=sys.stderr)
    print(f"{case.title}: {time.monotonic() - start:.0f} s", flush=True)
    save()


def measure_steps(
    device: str,
    steps: list[dict[str, Any]],
    ends: float,
    save: Callable[[], None],
    several: Sequence[step_figures.Case] | None = None,
) -> list[Check]:
    """Whole training steps into `steps`, as many cases as there is time for; those that failed or were left out."""
    chosen = step.cases(device) if several is None else several
    calls = [(f"steps of {case.title}", partial(step.measure_apart, case, device)) for case in chosen]
    return _each(calls, steps, ends, save, CASE_SECONDS[device])


def measure_densenets(
    device: str, densenets: list[dict[str, Any]], ends: float, save: Callable[[], None]
) -> list[Check]:
    """DenseNets in every memory into `densenets`, likewise."""
    chosen = densenet.reported(device)
    calls = [(f"memories of {case.title}", partial(densenet.measure, case, device)) for case in chosen]
    return _each(calls, densenets, ends, save, CASE_SECONDS[device])


def _each(
    calls: Sequence[tuple[str, Callable[..., dict[str, Any]]]],
    records: list[dict[str, Any]],
    ends: float,
    save: Callable[[], None],
    least: float,
) -> list[Check]:
    """What the calls give, each in the time that is left but for `least` seconds of those after it, into `records`;
    those that failed or were left out, in part or whole."""
    found = []
    for number, (name, call) in enumerate(calls, 1):
        start = time.monotonic()
        if ends - start < least:
            found.append(outcome(name, TIME_OVER, done=False))
            continue
        given = max(least, ends - start - least * (len(calls) - number))
        try:
            records.append(call(timeout=None if ends == math.inf else given))
            missing = _missing(records[-1])
            if missing:
                found.append(outcome(name, f"left out in part: {', '.join(missing)}", done=False))
        except subprocess.TimeoutExpired:
            found.append(outcome(name, TIME_OVER, done=False))
        except subprocess.CalledProcessError as error:
            found.append(outcome(name, f"failed, status {error.returncode}", passed=False))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        save()
    return found


def _missing(record: dict[str, Any]) -> list[str]:
    """Who had no time, or whose memory had none."""
    entries = {**record.get("trainers", {}), **record.get("providers", {})}
    late = [name for name, entry in entries.items() if (entry["failed"] or "").startswith("left out")]
    return late + [f"memory of {name}" for name, entry in entries.items() if entry.get("memory_failed") == TIME_OVER]


def measure_loaders(ends: float) -> tuple[Check, dict[str, Any] | None]:
    """The loaders alone, in a process of their own: some change how many threads there are, on import."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loaders.json"
        found = checks.check("loaders", [sys.executable, "-m", "benchmarks.loaders", "--json", str(file)], ends)
        return found, json.loads(file.read_text())["loaders"] if file.exists() else None


def _ours_failed(records: list[dict[str, Any]]) -> bool:
    entries = [entry for record in records for entry in record["providers"].values() if entry["kind"] == "ban_fast"]
    return any(entry["refused"] or entry["failed"] for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
