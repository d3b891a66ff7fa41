"""The measuring processes of one run: a worker for each allocator's settings on a CPU, one on a GPU.

Cases go to the workers one after another, never two at a time. In a worker all providers of a case take turns in one
process; what differs between workers is the environment that glibc's malloc reads at a process's start.
"""

import json
import math
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks import cuda
from benchmarks.cases import Case, Objective

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, TUNED = "default malloc", "tuned malloc"
# No allocation by mmap and no memory given back: freed blocks keep their pages, and no step pays for page faults.
TUNING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_TOP_PAD_": str(2**26)}
CASE_SECONDS = {"cpu": 2.0, "cuda": 1.0}
# Without a sign of life: compiling for a CPU takes half a minute, max-autotune on a GPU less.
SILENCE = {"cpu": 300.0, "cuda": 90.0}


class OutOfTime(Exception):
    """The run's time was over before a case was done."""


class WorkerFailed(Exception):
    """A measuring process could not measure a case; the message says why."""


class WorkerDied(WorkerFailed):
    """It crashed, hung or lost its device, in the turn of the provider `at`."""

    def __init__(self, message: str, at: str) -> None:
        super().__init__(message)
        self.at = at


class Session:
    """Measures cases, until it is closed."""

    def __init__(self, device: str, *, ends: float | None = None, most_bytes: int | None = None) -> None:
        """`ends` is the time.monotonic() at which a case still running is given up, `most_bytes` a process's memory."""
        self.device = device
        self.most_bytes = most_bytes
        self.ends = ends
        self.peak_bytes: dict[str, int] = {}
        """The most memory that each worker has held."""
        self._workers: dict[str, Worker] = {}
        self._excluded: dict[Objective, dict[str, str]] = {}
        """Providers that a process died of, and how: they have no further turn at that objective."""

    @property
    def environments(self) -> dict[str, dict[str, str]]:
        """A name and the malloc settings of each worker."""
        if self.device == "cuda":
            return {"cuda": {}}
        # Other allocators than glibc's don't read these variables: one setting is all there is.
        return {DEFAULT: {}, TUNED: TUNING} if platform.libc_ver()[0] == "glibc" else {DEFAULT: {}}

    def settings(self, case: Case) -> list[str]:
        """The settings that this case gets figures for."""
        return cuda.settings(case) if self.device == "cuda" else list(self.environments)

    def measure(self, case: Case, *, autotune: bool) -> list[dict[str, Any]]:
        """The records of measure.Bench.measure, one a setting, with max-autotune where `autotune`.

        A provider that its process dies of is left out, and the case measured again in another process.
        OutOfTime, WorkerFailed.
        """
        records: list[dict[str, Any]] = []
        for name in self.environments:
            request = {
                "case": case.to_dict(),
                "device": self.device,
                "settings": self.settings(case) if self.device == "cuda" else [name],
                "autotune": autotune,
                "seconds": CASE_SECONDS[self.device],
                "most_bytes": self.most_bytes,
            }
            records += self._ask(name, case, request)
        return records

    def _ask(self, name: str, case: Case, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The records of one worker, or of those that take its place."""
        excluded = self._excluded.setdefault(case.objective, {})
        while True:
            if name not in self._workers:
                self._workers[name] = Worker(self.environments[name], self.device)
            try:
                reply = self._workers[name].ask(request | {"excluded": excluded}, self.ends, SILENCE[self.device])
            except WorkerDied as error:
                self._workers.pop(name).close()
                if not error.at or error.at in excluded:
                    raise WorkerFailed(f"{name}: {error}") from None
                excluded[error.at] = f"in {case.id}: {error}"
                continue
            except OutOfTime:
                self._workers.pop(name).close()
                raise
            self.peak_bytes[name] = max(reply["peak_bytes"], self.peak_bytes.get(name, 0))
            if "error" in reply:
                raise WorkerFailed(f"{name}: {reply['error']}")
            records: list[dict[str, Any]] = reply["records"]
            return records

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers.values():
            worker.close()


class Worker:
    """One `python -m benchmarks.worker`, in a process group of its own: torch.compile has children."""

    def __init__(
        self, environment: dict[str, str], device: str, program: Sequence[str] = ("-m", "benchmarks.worker")
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
        if device == "cpu":
            kept.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes would run beside the clock
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, *program],
            bufsize=0,  # nothing left to write when a dead worker's pipe is closed
            cwd=ROOT,
            env=kept | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._read = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any], ends: float | None, silence: float) -> dict[str, Any]:
        """Its reply. OutOfTime at the time.monotonic() `ends`; WorkerDied, also where it is silent for so long."""
        assert self._process.stdin is not None
        at = ""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            while "at" in (message := json.loads(self._line(ends, silence))):
                at = message["at"]
        except (BrokenPipeError, EOFError):
            raise WorkerDied(self._death(), at) from None
        except TimeoutError:
            raise WorkerDied(f"a measuring process hung: no sign of it for {silence:.0f} s", at) from None
        reply: dict[str, Any] = message
        return reply

    def close(self) -> None:
        """End it and its children, and wait for it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _line(self, ends: float | None, silence: float) -> bytes:
        """What it says next. OutOfTime; TimeoutError, EOFError."""
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left = math.inf if ends is None else max(0.0, ends - time.monotonic())
            if not select.select([source], [], [], min(left, silence))[0]:
                raise OutOfTime if left <= silence else TimeoutError
            chunk = os.read(source, 1 << 16)
            if not chunk:
                raise EOFError
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _death(self) -> str:
        """How it ended: its status, and the last line that it wrote."""
        self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"a measuring process ended with status {self._process.returncode}", *last])
