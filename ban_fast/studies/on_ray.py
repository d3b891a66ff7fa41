"""Runs on a Ray cluster: a task a run, which starts the same process as a local pool does, and watches it.

The study's directory must be one that all machines share: Ray moves no files.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from .resources import Resources
from .worker import PATIENCE, Job, Outcome, Worker

_SECONDS_TO_CONNECT = 10.0
_TICK = 0.2
"""Seconds between two looks of a task at its process."""


def is_asked_for() -> bool:
    """Whether the environment names a Ray cluster, and Ray is here to reach it."""
    return bool(os.environ.get("RAY_ADDRESS")) and importlib.util.find_spec("ray") is not None


class RayEngine:
    """Tasks with their shares of CPUs and GPUs, on the cluster that RAY_ADDRESS names, or else on one made here."""

    def __init__(self, directory: Path, asked: Resources, wants_gpus: bool) -> None:
        """UserError where Ray is not installed or can't be reached, or none of its machines has room for a run."""
        asked.validate()
        self._ray = _ray()
        self._directory = directory
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray)
        self._names: dict[Any, str] = {}
        try:
            self._cpus = 1.0 if asked.cpus_per_run is None else asked.cpus_per_run
            has_gpus = wants_gpus and self._ray.cluster_resources().get("GPU", 0) > 0
            self._gpus = float(has_gpus) if asked.gpus_per_run is None else asked.gpus_per_run
            room = self._room()
            if not room:
                raise UserError(
                    f"no machine of the Ray cluster has {self._cpus:g} CPUs and {self._gpus:g} GPUs for a run: lower "
                    "--cpus-per-run or --gpus-per-run"
                )
            self._workers = asked.workers or room
            self._bell = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Bell).remote()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        return len(self._names)

    def has_room(self) -> bool:
        return self.running < self._workers

    def start(self, name: str) -> None:
        job = Job.here(self._directory, name, max(1, int(self._cpus)), None)
        # max_calls=1: each run in a process of Ray's own too. Retries are the study's: they are counted and told.
        task = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, max_calls=1)(_supervise)
        self._names[task.remote(job, self._bell)] = name

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        done, _ = self._ray.wait(list(self._names), num_returns=1, timeout=seconds)
        found = []
        for reference in done:
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                outcome = Outcome(kind="failed", text=" ".join(f"Ray lost it: {type(error).__name__}: {error}".split()))
            found.append((self._names.pop(reference), outcome))
        return found

    def ask_to_stop(self) -> None:
        self._ray.get(self._bell.ring.remote())

    def close(self) -> None:
        if self._names:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self.ask_to_stop()
            _, left = self._ray.wait(list(self._names), num_returns=len(self._names), timeout=PATIENCE)
            for reference in left:
                self._ray.cancel(reference, force=True)
            self._names = {}
        if self._is_ours:
            self._ray.shutdown()

    def _room(self) -> int:
        """Runs that the cluster's machines have room for at once."""
        room = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                cpus, gpus = (node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU"))
                fits = [cpus / self._cpus] + ([gpus / self._gpus] if self._gpus else [])
                room += math.floor(min(fits) + 1e-9)
        return room


class _Bell:
    """Rung once, for all tasks to hear, on whatever machine."""

    def __init__(self) -> None:
        self._is_rung = False

    def ring(self) -> None:
        self._is_rung = True

    def is_rung(self) -> bool:
        return self._is_rung


def _supervise(job: Job, bell: Any) -> Outcome:
    """The task. Where it dies, its process saves the run and ends by itself."""
    ray = importlib.import_module("ray")
    if not Path(job.directory).is_dir():
        text = (
            f"{job.directory} is not there on {os.uname().nodename}: --out must be a directory that all machines share"
        )
        return Outcome(kind="mistake", text=text)
    if ray.get(bell.is_rung.remote()):
        return Outcome(kind="stopped")
    worker, asked = Worker(job), None
    while (outcome := worker.outcome()) is None:
        if asked is None:
            asked = bell.is_rung.remote()
        elif ray.wait([asked], timeout=0)[0]:
            if ray.get(asked):
                worker.ask_to_stop()
            asked = None
        time.sleep(_TICK)
    return outcome


def _ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray: Ray is not installed; pip install 'ban_fast[ray]', or use --engine local")
    return importlib.import_module("ray")


def _connect(ray: Any) -> None:
    """Ray takes over the handlers of some signals: put them back."""
    _refuse_nobody(os.environ.get("RAY_ADDRESS", ""))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--engine ray: cannot reach or start a Ray cluster: {' '.join(str(error).split())}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_nobody(address: str) -> None:
    """UserError where nobody listens at HOST:PORT: Ray itself asks for minutes, and writes of each time."""
    named = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/]+?)\]?:(?P<port>\d{1,5})", address)
    if named is None:  # "auto", say
        return
    try:
        socket.create_connection((named["host"], int(named["port"])), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"no Ray cluster answers at {address}, where RAY_ADDRESS says it is ({reason}): start it, correct that, or "
            "use --engine local"
        ) from error
