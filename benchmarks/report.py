"""`python -m benchmarks.report [DIR]`: all this machine can run, into one results file, and the tables made of them.

On a GPU also the build, the GPU tests and compute-sanitizer, all in under nine minutes.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks import run as runs
from benchmarks.figures import Figures
from benchmarks.run import Run
from benchmarks.session import OutOfTime, WorkerFailed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
GPU_MINUTES = 9.0
CHECK_SECONDS = {"build": 180, "GPU tests": 150, "memcheck": 45, "racecheck": 45}
Check = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument("--tables", action="store_true", help="measure nothing: only rewrite the tables")
    parser.add_argument("--commit", help="the commit measured, where the checkout has no .git that says so")
    options = parser.parse_args(arguments)
    failed = False
    if not options.tables:
        results, failed = measure(options.commit)
        options.directory.mkdir(parents=True, exist_ok=True)
        path = options.directory / machine.file_name(results)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path}")
        figures = Figures(results["records"])
        print(tables.summary(figures, figures.cases()), tables.target_table(results), sep="\n\n")
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


def measure(commit: str | None) -> tuple[dict[str, Any], bool]:
    """The results, and whether a check or a measurement failed."""
    begin = time.monotonic()
    device = runs.device()
    described = machine.describe(device, commit)
    print(tables.caption(described))
    done = checks(device)
    minutes = None
    if device == "cuda":
        left = GPU_MINUTES - (time.monotonic() - begin) / 60
        minutes = (left - 1.0, left - 0.25)
    failed = any(not check["passed"] for check in done)
    with Run(device, full=device == "cpu", minutes=minutes) as run:
        for case in run.cases:
            start = time.monotonic()
            try:
                records = run.measure(case)
            except OutOfTime:
                continue
            except WorkerFailed as error:
                print(error, file=sys.stderr)
                failed = True
                break
            failed = failed or _ours_failed(records)
            print(f"{case.title}: {time.monotonic() - start:.0f} s", flush=True)
        return run.results(described, done), failed


def checks(device: str) -> list[Check]:
    """The build everywhere; on a GPU the GPU tests and compute-sanitizer where there is one."""
    python = sys.executable
    done = []
    missing = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        done.append(_passed("build", f"not built anew: {', '.join(missing)} missing"))
    else:
        done.append(_check("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"]))
    if device != "cuda":
        return done
    done.append(_check("GPU tests", [python, "-m", "pytest", "-q", "-m", "gpu", "-x"]))
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            done.append(_passed(tool, "compute-sanitizer is not installed"))
        else:
            watched = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "benchmarks.sanitize"]
            done.append(_check(tool, ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched]))
    return done


def _check(name: str, command: list[str]) -> Check:
    start = time.monotonic()
    try:
        answer = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=CHECK_SECONDS[name], check=False
        )
    except subprocess.TimeoutExpired:
        return _passed(name, f"not done within {CHECK_SECONDS[name]} s") | {"passed": False}
    seconds = time.monotonic() - start
    last = (answer.stdout + answer.stderr).strip().splitlines()[-1:] or ["no output"]
    if answer.returncode:
        print(answer.stdout, answer.stderr, sep="\n", file=sys.stderr)
    outcome = f"{'passed' if answer.returncode == 0 else f'failed, status {answer.returncode}'}, {seconds:.0f} s"
    print(f"{name}: {outcome}", flush=True)
    return {"name": name, "passed": answer.returncode == 0, "outcome": f"{outcome} ({last[0].strip(' =')})"}


def _passed(name: str, outcome: str) -> Check:
    return {"name": name, "passed": True, "outcome": outcome}


def _ours_failed(records: list[dict[str, Any]]) -> bool:
    entries = [entry for record in records for entry in record["providers"].values() if entry["kind"] == "ban_fast"]
    return any(entry["refused"] or entry["failed"] for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
