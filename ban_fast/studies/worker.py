"""One run of a study in a process of its own, and the process as who started it sees it.

What starts it holds a pipe to its standard input. When that closes, because the run is to stop or because its starter
has died, the run saves itself and ends: no signal is needed, and nothing is left behind by a starter that was killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What says that a process is one of several that train one run, which no study's is; and what else torchrun sets."""
_OF_TORCHRUN = ("TORCHELASTIC_", "GROUP_", "ROLE_")
LOGS = "logs"
"""Folder of a study: what each run said, and the tracebacks of those that failed."""
PATIENCE = 30.0
"""Seconds that a run is given to save itself where nobody waits for its outcome."""
_LONGEST = 2000
"""Letters of an outcome's text."""
_START = "import sys; sys.path[:] = sys.argv[3:]; from ban_fast.studies.worker import main; main(*sys.argv[1:3])"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run's process ended."""

    kind: Literal["done", "stopped", "mistake", "failed"]
    """"mistake" is a UserError, which another try would meet again; "failed" is everything else."""
    text: str = ""
    """Why, in one line."""
    notes: tuple[str, ...] = ()
    """What a person should read of it although all went well."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to know to perform a run, on whatever machine."""

    directory: str
    """The study's, absolute."""
    name: str
    threads: int
    gpus: tuple[str, ...] | None
    """For CUDA_VISIBLE_DEVICES; None: as the environment says."""
    path: tuple[str, ...]
    """The starter's sys.path: `--model module:factory` is found where it was."""
    place: str
    """The starter's current directory."""
    variables: Mapping[str, str]
    """Of the starter's environment, those of ban_fast."""

    @classmethod
    def here(cls, directory: Path, name: str, threads: int, gpus: tuple[str, ...] | None) -> "Job":
        """A job as it is asked for in this process."""
        return cls(
            directory=str(directory),
            name=name,
            threads=threads,
            gpus=gpus,
            path=tuple(sys.path),
            place=os.getcwd(),
            variables={key: value for key, value in os.environ.items() if key.startswith("BAN_FAST_")},
        )


class Worker:
    """A process that performs a run: a session of its own, so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, job: Job) -> None:
        own = {key: value for key, value in os.environ.items() if not _is_of_a_launcher(key)}
        environment = {**own, **job.variables, "OMP_NUM_THREADS": str(job.threads)}
        environment["MKL_NUM_THREADS"] = str(job.threads)  # torch heeds it before the other
        environment.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve the other runs
        if job.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        path = [*sys.path, *(entry for entry in job.path if entry not in sys.path)]
        self.name = job.name
        logs = Path(job.directory) / LOGS
        logs.mkdir(exist_ok=True)
        # Not a pipe: nobody reads while the run is at work, and what is written has no bound.
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - `outcome` closes it
        with open(logs / f"{job.name}.txt", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, job.directory, job.name, *path],
                stdin=subprocess.PIPE,
                stdout=self._answer,
                stderr=log,
                env=environment,
                cwd=job.place if os.path.isdir(job.place) else None,
                start_new_session=True,
            )

    def ask_to_stop(self) -> None:
        """Let the run save itself and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def outcome(self) -> Outcome | None:
        """How it ended; None while it has not."""
        code = self._process.poll()
        if code is None:
            return None
        self.ask_to_stop()
        with self._answer:
            self._answer.seek(0)
            said = self._answer.read()
        try:
            values = json.loads(said.rpartition(b"\n")[2])
            return Outcome(**{**values, "notes": tuple(values["notes"])})
        except (ValueError, TypeError, KeyError):
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            return Outcome(kind="failed", text=how)

    def end(self) -> None:
        """Wait until it has saved itself and ended, but not forever; its checkpoint stands."""
        self.ask_to_stop()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.outcome()


def main(directory: str, name: str) -> None:
    """The process: perform the run, and write the outcome to what was standard output. All else goes to the log."""
    answer = os.dup(1)
    os.dup2(2, 1)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_await_end, args=(stop,), daemon=True).start()
    outcome = _perform(Path(directory), name, stop)
    os.write(answer, b"\n" + json.dumps(asdict(outcome)).encode())  # libraries may have printed while imported


def _is_of_a_launcher(variable: str) -> bool:
    return variable in _OF_A_LAUNCHER or variable.startswith(_OF_TORCHRUN)


def _await_end(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


def _perform(directory: Path, name: str, stop: threading.Event) -> Outcome:
    from ..errors import UserError
    from ..training import Interrupted
    from .perform import perform

    notes: list[str] = []
    try:
        perform(directory, name, stop, notes)
    except Interrupted:
        return Outcome(kind="stopped", notes=tuple(notes))
    except UserError as error:
        return Outcome(kind="mistake", text=_one_line(str(error)), notes=tuple(notes))
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Outcome(kind="failed", text=_one_line(text), notes=tuple(notes))
    return Outcome(kind="done", notes=tuple(notes))


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]} ..."
