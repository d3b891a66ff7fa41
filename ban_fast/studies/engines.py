"""Where the processes of runs are started: what all engines have in common, and the one of this machine."""

import time
from pathlib import Path
from typing import Protocol

from .resources import Slot
from .worker import Job, Outcome, Worker

ENGINES = ("auto", "local", "ray")


class Engine(Protocol):
    """Starts runs, and tells how they ended."""

    @property
    def running(self) -> int:
        """Runs that were started and have not ended."""

    def has_room(self) -> bool:
        """Whether one more can be started."""

    def start(self, name: str) -> None:
        """Start a run, in its directory."""

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        """Runs that have ended, as soon as there is one; none after so many seconds."""

    def ask_to_stop(self) -> None:
        """Let all that are running save themselves and end."""

    def close(self) -> None:
        """Leave nothing running: what is, saves itself first."""


class LocalPool:
    """A process a run on this machine, each in a slot of its own."""

    def __init__(self, directory: Path, slots: list[Slot]) -> None:
        self._directory = directory
        self._free = list(reversed(slots))
        self._workers: list[tuple[Slot, Worker]] = []

    @property
    def running(self) -> int:
        return len(self._workers)

    def has_room(self) -> bool:
        return bool(self._free)

    def start(self, name: str) -> None:
        slot = self._free[-1]
        self._workers.append((slot, Worker(Job.here(self._directory, name, slot.threads, slot.gpus))))
        self._free.pop()

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        until = time.monotonic() + seconds
        while True:
            found, left = [], []
            for slot, worker in self._workers:
                outcome = worker.outcome()
                if outcome is None:
                    left.append((slot, worker))
                else:
                    found.append((worker.name, outcome))
                    self._free.append(slot)
            self._workers = left
            if found or time.monotonic() >= until:
                return found
            time.sleep(0.02)

    def ask_to_stop(self) -> None:
        for _, worker in self._workers:
            worker.ask_to_stop()

    def close(self) -> None:
        self.ask_to_stop()
        for _, worker in self._workers:
            worker.end()
        self._workers = []
