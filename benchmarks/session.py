"""The measuring processes of one run: a worker for each allocator's settings on a CPU, one on a GPU.

Cases go to the workers one after another, never two at a time. In a worker all providers of a case take turns in one
process; what differs between workers is the environment that glibc's malloc reads at a process's start.
"""

import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from benchmarks import cuda
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, TUNED = "default malloc", "tuned malloc"
# No allocation by mmap and no memory given back: freed blocks keep their pages, and no step pays for page faults.
TUNING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_TOP_PAD_": str(2**26)}
CASE_SECONDS = 2.0


class OutOfTime(Exception):
    """The run's time was over before a case was done."""


class WorkerFailed(Exception):
    """A measuring process died or could not measure; the message says how."""


class Session:
    """Measures cases, until it is closed."""

    def __init__(self, device: str, *, ends: float | None = None) -> None:
        """`ends` is the time.monotonic() at which a case still running is given up."""
        self.device = device
        self.ends = ends
        self._workers: dict[str, Worker] = {}

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
        """The records of measure.measure_case, one a setting, with max-autotune where `autotune`.

        OutOfTime, WorkerFailed.
        """
        records: list[dict[str, Any]] = []
        for name, environment in self.environments.items():
            if name not in self._workers:
                self._workers[name] = Worker(environment, self.device)
            request = {
                "case": case.to_dict(),
                "device": self.device,
                "settings": self.settings(case) if self.device == "cuda" else [name],
                "autotune": autotune,
                "seconds": CASE_SECONDS,
            }
            reply = self._workers[name].ask(request, self.ends)
            if "error" in reply:
                raise WorkerFailed(f"{case.id}, {name}: {reply['error']}")
            records += reply["records"]
        return records

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers.values():
            worker.close()


class Worker:
    """One `python -m benchmarks.worker`, in a process group of its own: torch.compile has children."""

    def __init__(self, environment: dict[str, str], device: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
        if device == "cpu":
            kept.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes would run beside the clock
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            bufsize=0,  # nothing left to write when a dead worker's pipe is closed
            cwd=ROOT,
            env=kept | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any], ends: float | None) -> dict[str, Any]:
        """Its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerFailed(self._death()) from None
        reply: dict[str, Any] = json.loads(self._line(ends))
        return reply

    def close(self) -> None:
        """End it and its children, and wait for it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _line(self, ends: float | None) -> bytes:
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        read = bytearray()
        while not read.endswith(b"\n"):
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not select.select([source], [], [], left)[0]:
                raise OutOfTime
            chunk = os.read(source, 1 << 16)
            if not chunk:
                raise WorkerFailed(self._death())
            read += chunk
        return bytes(read)

    def _death(self) -> str:
        self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-15:]
        return "\n".join([f"a measuring process ended with status {self._process.returncode}", *tail])
