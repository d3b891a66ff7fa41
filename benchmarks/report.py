"""`python -m benchmarks.report [DIR]`: all this machine can run, into one results file, and the tables made of them.

On a GPU also the GPU tests and compute-sanitizer, all in under nine minutes. What fails is a line in the results, and
the rest goes on; the file is written anew after every step, so that a run that is killed leaves what it had.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import densenet, densenet_figures, machine, step, step_figures, tables
from benchmarks import run as runs
from benchmarks.figures import Figures
from benchmarks.run import Run
from benchmarks.session import OutOfTime, WorkerFailed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MINUTES = {"cpu": math.inf, "cuda": 8.75}
LOSSES = {"cpu": 0.5, "cuda": 0.7}
"""Of the time for measuring, where it is limited: whole steps, loaders and DenseNets come after the losses."""
SANITIZER_MINUTES = 1.75  # of those, kept for it where it is installed
# Triton's tests compile some 370 kernels first, most of a second each.
GPU_TESTS = {
    "GPU tests": ["tests", "--ignore=tests/backends/triton"],
    "GPU tests of Triton": ["tests/backends/triton"],
}
CHECK_SECONDS = {
    "build": 120.0,
    "loaders": 300.0,
    "GPU tests": 120.0,
    "GPU tests of Triton": 180.0,
    "small kernels": 60.0,
    "memcheck": 60.0,
    "racecheck": 60.0,
}
LEAST_SECONDS = 10.0
"""A check that would have less is left out."""
CASE_SECONDS = 60.0
"""A case of whole steps or of DenseNets, its networks being compiled, would not be done in less."""
SANITIZER, TOOLS = "compute-sanitizer", ("memcheck", "racecheck")
Check = dict[str, Any]


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
    ends = time.monotonic() + 60 * (MINUTES[device] if minutes is None else minutes)
    described = machine.describe(device, commit)
    path = directory / machine.file_name(described)
    print(tables.caption(described | {"complete": True}))
    done = [build()] if builds else []
    if device == "cuda":
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow"]
        done += [check(name, [*pytest, *paths], ends) for name, paths in GPU_TESTS.items()]
    last = ends - 60 * SANITIZER_MINUTES if device == "cuda" and shutil.which(SANITIZER) else ends
    left = LOSSES[device] * (last - time.monotonic()) / 60
    steps: list[dict[str, Any]] = []
    densenets: list[dict[str, Any]] = []
    loaded: dict[str, Any] | None = None
    with Run(device, full=True, minutes=None if left == math.inf else (left - 0.5, left)) as run:

        def save(complete: bool) -> None:
            directory.mkdir(parents=True, exist_ok=True)
            found = run.results(described, done, complete=complete)
            found |= {"steps": steps, "loaders": loaded, "densenets": densenets}
            machine.write(path, json.dumps(found, indent=1) + "\n")

        save(False)
        measure_cases(run, lambda: save(False))
        done += measure_steps(device, steps, last, lambda: save(False))
        if device == "cpu":
            outcome, loaded = measure_loaders(last)
            done.append(outcome)
            save(False)
        done += measure_densenets(device, densenets, last, lambda: save(False))
        if device == "cuda":
            done += sanitize(ends)
        save(True)
    print(f"wrote {path}")
    results = json.loads(path.read_text())
    figures = Figures(results["records"])
    print(tables.summary(figures, figures.cases()), *map(step_figures.table, steps), sep="\n\n")
    print("", *map(densenet_figures.table, densenets), sep="\n\n")
    print(f"\n{tables.target_table(results)}")
    return any(not each["passed"] for each in done) or bool(run.failures) or _ours_failed(run.records)


def measure_cases(run: Run, save: Callable[[], None]) -> None:
    """All cases of a run; those that cannot be measured are its failures, or left out."""
    for case in run.cases:
        start = time.monotonic()
        try:
            run.measure(case)
        except OutOfTime:
            continue
        except WorkerFailed as error:
            print(f"{case.title}: {error}", file=sys.stderr)
        print(f"{case.title}: {time.monotonic() - start:.0f} s", flush=True)
        save()


def measure_steps(device: str, steps: list[dict[str, Any]], ends: float, save: Callable[[], None]) -> list[Check]:
    """Whole training steps into `steps`, as many cases as there is time for; those that failed or were left out."""
    calls = [(f"steps of {case.title}", partial(step.measure_apart, case, device)) for case in step.cases(device)]
    return _each(calls, steps, ends, save)


def measure_densenets(
    device: str, densenets: list[dict[str, Any]], ends: float, save: Callable[[], None]
) -> list[Check]:
    """DenseNets in every memory into `densenets`, likewise."""
    cases = densenet.reported(device)
    calls = [(f"memories of {case.title}", partial(densenet.measure, case, device)) for case in cases]
    return _each(calls, densenets, ends, save)


def _each(
    calls: Sequence[tuple[str, Callable[..., dict[str, Any]]]],
    records: list[dict[str, Any]],
    ends: float,
    save: Callable[[], None],
) -> list[Check]:
    """What the calls give, each in the time that is left, into `records`; those that failed or were left out."""
    failed = []
    for name, call in calls:
        start = time.monotonic()
        if ends - start < CASE_SECONDS:
            failed.append(_outcome(name, "left out: the run's time was over", passed=True))
            continue
        try:
            records.append(call(timeout=None if ends == math.inf else ends - start))
        except subprocess.TimeoutExpired:
            failed.append(_outcome(name, "left out: the run's time was over", passed=True))
        except subprocess.CalledProcessError as error:
            failed.append(_outcome(name, f"failed, status {error.returncode}", passed=False))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        save()
    return failed


def measure_loaders(ends: float) -> tuple[Check, dict[str, Any] | None]:
    """The loaders alone, in a process of their own: some change how many threads there are, on import."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loaders.json"
        outcome = check("loaders", [sys.executable, "-m", "benchmarks.loaders", "--json", str(file)], ends)
        return outcome, json.loads(file.read_text())["loaders"] if file.exists() else None


def build() -> Check:
    """The build, where its tools are here without an isolated environment."""
    missing = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        return _outcome("build", f"not built anew: {', '.join(missing)} missing", passed=True)
    return check("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"])


def sanitize(ends: float) -> list[Check]:
    """The small kernels by themselves, which compiles them, then watched by compute-sanitizer."""
    program = [sys.executable, "-m", "benchmarks.sanitize"]
    sanitizer = shutil.which(SANITIZER)
    if sanitizer is None:
        return [_outcome(tool, f"{SANITIZER} is not installed", passed=True) for tool in TOOLS]
    done = [check("small kernels", program, ends)]
    for tool in TOOLS:
        watched = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program]
        done.append(check(tool, ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched], ends))
    return done


def check(name: str, command: list[str], ends: float = math.inf) -> Check:
    """What came of a command, in its time and before `ends`."""
    start = time.monotonic()
    limit = min(CHECK_SECONDS[name], ends - start)
    if limit < LEAST_SECONDS:
        return _outcome(name, "left out: the run's time was over", passed=True)
    try:
        answer = _run(command, limit)
    except subprocess.TimeoutExpired as error:
        print(error.output, file=sys.stderr)
        return _outcome(name, f"not done within {limit:.0f} s ({_last(error.output)})", passed=False)
    except OSError as error:
        return _outcome(name, f"could not be started: {error}", passed=False)
    if answer.returncode:
        print(answer.stdout, file=sys.stderr)
    verdict = "passed" if answer.returncode == 0 else f"failed, status {answer.returncode}"
    outcome = f"{verdict}, {time.monotonic() - start:.0f} s ({_last(answer.stdout)})"
    return _outcome(name, outcome, passed=answer.returncode == 0)


def _run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Run it with its children, none of which outlives `limit` seconds."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                error.output = process.communicate()[0]
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def _last(output: str | None) -> str:
    """The last line, without pytest's rule."""
    return ((output or "").strip().splitlines() or ["no output"])[-1].strip(" =")


def _outcome(name: str, outcome: str, *, passed: bool) -> Check:
    print(f"{name}: {outcome}", flush=True)
    return {"name": name, "passed": passed, "outcome": outcome}


def _ours_failed(records: list[dict[str, Any]]) -> bool:
    entries = [entry for record in records for entry in record["providers"].values() if entry["kind"] == "ban_fast"]
    return any(entry["refused"] or entry["failed"] for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
