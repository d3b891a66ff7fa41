"""What a report runs beside its measurements: the build, tests, compute-sanitizer; each a line in the results.

A check has passed, or failed, or was not done: left out, or cut off by the clock with nothing failed until then.
"""

import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import TIME_OVER

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"build": 300.0, "loaders": 300.0, "small kernels": 150.0, "memcheck": 60.0, "racecheck": 60.0}
TEST_SECONDS = 180.0
"""Of tests that decide nothing: those of Triton compile some 370 kernels, half a second to a second of a core each."""
LEAST_SECONDS = 10.0
"""A check that would have less is left out."""
ARCHITECTURES = "BAN_FAST_CUDA_ARCHS"
SANITIZER, TOOLS = "compute-sanitizer", ("memcheck", "racecheck")
PYTEST = (sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no", "-m", "gpu and not slow")
NO_TESTS = 5
"""pytest's status where nothing was asked for."""
NATIVE, DENSE = "tests/backends/cuda/test_cuda_gpu.py", "tests/backends/triton/test_triton_dense_gpu.py"
STEPS = "tests/training/test_whole_step_gpu.py"
FIRST: tuple[tuple[str, ...], ...] = ((NATIVE, "-k", "not compiled"), (DENSE,))
"""Of the kernels that most targets are of. What is timed is held against float64, or plain gradients, besides."""
Check = dict[str, Any]


def rest() -> list[tuple[str, ...]]:
    """pytest's arguments for the other tests of a GPU: Triton's by file, since each compiles its own kernels, and by
    themselves those that break recordings on purpose."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/backends/triton/**/test_*.py"))
    others = ("tests", "--ignore=tests/backends/triton", "--ignore=tests/backends/cuda", f"--ignore={STEPS}")
    return [
        others,
        (STEPS,),
        (NATIVE, "-k", "compiled"),
        *((file,) for file in files if file != DENSE and not file.endswith("_aot.py")),
    ]


def build(most: float = math.inf) -> Check:
    """The build, where its tools are here without an isolated environment; on a GPU for that one alone, in half the
    time."""
    missing = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        return outcome("build", f"not built anew: {', '.join(missing)} missing", done=False)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if torch.cuda.is_available():
        # Where the compiler can't be used that is a failure; else half of the kernels would be missing, in silence.
        settings = ["BAN_FAST_CUDA=on"] if shutil.which("nvcc") else []
        if ARCHITECTURES not in os.environ:
            major, minor = torch.cuda.get_device_capability()
            settings.append(f"{ARCHITECTURES}={major}{minor}")
        command = ["env", *settings, *command]
    found = check("build", command, time.monotonic() + most)
    return found | {"passed": found["passed"] and found["done"]}  # half of one is none


def sanitize(ends: float) -> list[Check]:
    """The small kernels by themselves, which compiles them, then watched by compute-sanitizer."""
    program = [sys.executable, "-m", "benchmarks.sanitize"]
    sanitizer = shutil.which(SANITIZER)
    if sanitizer is None:
        return [outcome(tool, f"{SANITIZER} is not installed", done=False) for tool in TOOLS]
    done = [check("small kernels", program, ends)]
    for tool in TOOLS:
        watched = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program]
        done.append(check(tool, ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched], ends))
    return done


def check(name: str, command: list[str], ends: float = math.inf) -> Check:
    """What came of a command, in its time and before `ends`."""
    start = time.monotonic()
    limit = min(SECONDS[name], ends - start)
    if limit < LEAST_SECONDS:
        return outcome(name, TIME_OVER, done=False)
    try:
        answer = _run(command, limit)
    except subprocess.TimeoutExpired as error:
        print(error.output, file=sys.stderr)
        return outcome(name, f"not done within {limit:.0f} s ({_last(error.output)})", done=False)
    except OSError as error:
        return outcome(name, f"could not be started: {error}", passed=False)
    if answer.returncode:
        print(answer.stdout, file=sys.stderr)
    verdict = "passed" if answer.returncode == 0 else f"failed, status {answer.returncode}"
    said = f"{verdict}, {time.monotonic() - start:.0f} s ({_last(answer.stdout)})"
    return outcome(name, said, passed=answer.returncode == 0)


class Tests(NamedTuple):
    """What came of one pytest."""

    counts: Counter[str]
    failed: list[str]
    late: bool
    error: str | None
    """That ended it without a test that failed."""


def tests(name: str, groups: Sequence[Sequence[str]], most: float, ends: float) -> Check:
    """What came of pytests with these arguments, as many at once as half the cores, within `most` seconds and `ends`.

    Those cut off have not failed, unless a test of theirs had by then.
    """
    start = time.monotonic()
    deadline = min(start + most, ends)
    if deadline - start < LEAST_SECONDS:
        return outcome(name, TIME_OVER, done=False)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        found = list(pool.map(lambda group: _tests(group, deadline), groups))
    counts = sum((each.counts for each in found), Counter[str]())
    failed = [test for each in found for test in each.failed]
    errors = [each.error for each in found if each.error is not None]
    late = sum(each.late for each in found)
    said = (
        [f"failed: {', '.join(failed[:5])}" + (f" and {len(failed) - 5} more" if failed[5:] else "")] if failed else []
    )
    said += errors
    if late:
        said.append(f"not done within {deadline - start:.0f} s, {late} of {len(found)} parts")
    numbers = ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "no test"
    verdict = "; ".join(said) or f"passed, {time.monotonic() - start:.0f} s"
    return outcome(name, f"{verdict} ({numbers})", passed=not (failed or errors), done=not late)


def _tests(arguments: Sequence[str], deadline: float) -> Tests:
    limit, nothing = deadline - time.monotonic(), Counter[str]()
    if limit < 1:
        return Tests(nothing, [], True, None)
    status, late = 0, False
    try:
        answer = _run([*PYTEST, *arguments], limit)
        output, status = answer.stdout, answer.returncode
    except subprocess.TimeoutExpired as error:
        output, late = error.output or "", True
    except OSError as error:
        return Tests(nothing, [], False, f"could not be started: {error}")
    lines = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?=\s|$)", output, re.MULTILINE)
    failed = list(dict.fromkeys(test for test, verdict in lines if verdict in ("FAILED", "ERROR")))
    if failed or status not in (0, NO_TESTS):
        print(output, file=sys.stderr)
    error = f"status {status}: {_last(output)}" if status not in (0, NO_TESTS) and not failed else None
    return Tests(Counter(verdict.lower() for _, verdict in lines), failed, late, error)


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


def outcome(name: str, said: str, *, passed: bool = True, done: bool = True) -> Check:
    """A line of the results."""
    print(f"{name}: {said}", flush=True)
    return {"name": name, "passed": passed, "done": done, "outcome": said}
