"""A run of a study: the very same `training.run`, begun or gone on with, its teacher that of the run it waited for.

One that others wait for then puts down what its teacher says to them.
"""

import threading
import time
from pathlib import Path
from typing import Any

from ..config import Config
from ..evaluation.run_directory import CONFIG
from ..training import Interrupted, Observer, Plan, run
from ..training.locks import InUse
from . import sharing
from .study import Study

_PATIENCE = 60.0
"""Seconds for a process whose starter was killed to save its run and leave its directory."""
_LONGEST_PAUSE = 5.0
"""Seconds between two tries to have a directory that is in use: each reads the data anew."""


def perform(directory: Path, name: str, stop: threading.Event, notes: list[str]) -> None:
    """Bring the run to its end. What `training.run` raises, Interrupted once `stop` is set among it."""
    study = Study.load(directory)
    planned = study[name]
    path, observer = directory / name, _Teller(notes)
    until, pause = time.monotonic() + _PATIENCE, 0.2
    while True:
        try:
            run(
                planned.config,
                out=path,
                resume=(path / CONFIG).exists(),
                teacher_from=None if planned.teacher is None else directory / planned.teacher,
                outputs_from=sharing.place_for(directory, planned),
                observer=observer,
                should_stop=stop.is_set,
            )
            observer.has_begun = True
            sharing.share(directory, study, name, observer, stop.is_set)
            return
        except InUse as busy:
            observer.waits(str(busy))
            # Once training has begun it is a teacher's cache, which another run reads or fills: that run will end.
            if not observer.has_begun and time.monotonic() > until:
                raise
            if stop.wait(pause):
                raise Interrupted from None
            pause = min(2 * pause, _LONGEST_PAUSE)


class _Teller(Observer):
    """Prints what happens, for the log, and keeps what a person should read."""

    def __init__(self, notes: list[str]) -> None:
        self.has_begun = False
        self._notes = notes
        self._reason = ""

    def waits(self, reason: str) -> None:
        """Say for what, once."""
        if reason != self._reason:
            print(f"waits: {reason}", flush=True)
        self._reason = reason

    def run_started(self, config: Config, plan: Plan) -> None:
        self.has_begun = True
        print(
            f"{plan.parameters:,} parameters on {plan.device}, {plan.generations} generations of {plan.steps:,} steps"
        )

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        print(f"generation {generation} ({objective}) from step {done_steps:,}", flush=True)

    def teacher_chosen(self, generation: int, text: str) -> None:
        print(f"generation {generation}: teacher {text}", flush=True)

    def generation_finished(self, generation: int, record: dict[str, Any]) -> None:
        print(f"generation {generation}: {record.get('test')}", flush=True)

    def message(self, text: str) -> None:
        if text not in self._notes:  # a run that waits for a cache begins again and again
            self._notes.append(text)
        print(f"note: {text}", flush=True)
