"""What a sweep says while it runs: bars on a terminal, a line for each run that has ended where nobody watches."""

import contextlib
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..report import describe
from ..studies import Outcome, Study, StudyObserver, StudyRun
from ..studies.progress import share
from .quiet import one_line
from .signals import Signals

_SECONDS_BETWEEN_LOOKS = 1.0


def narrator(signals: Signals, directory: Path, again: str) -> "SweepNarrator":
    """The kind that suits where output goes: bars on stderr, or stdout, if that is a terminal; else lines on stdout.

    `again` tells how the study is continued, for a second signal, which leaves at once.
    """
    for stream in (sys.stderr, sys.stdout):
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            return SweepBars(signals, directory, again, Console(file=stream))
    return SweepNarrator(signals, directory, again)


class SweepNarrator(StudyObserver):
    """A line on stdout for each run that has ended. A reader that has gone (`| head`) ends them, not the runs."""

    def __init__(self, signals: Signals, directory: Path, again: str) -> None:
        self.total = self.done = self.failed = 0
        self.directory = directory
        self._signals, self._again = signals, again
        self._began: dict[str, float] = {}

    def __enter__(self) -> "SweepNarrator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def counts(self) -> str:
        """ "3 of 8 runs done, 1 failed"."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.total} runs done{failed}"

    def study_started(self, study: Study, finished: frozenset[str]) -> None:
        self._signals.answer = "ask"
        self._signals.remark = f" at once; the last checkpoints stand: {self._again}"
        self.total, self.done = len(study.runs), len(finished)
        helpers = sum(run.is_helper for run in study.runs)
        shared = f", {helpers} of them for a teacher that several share" if helpers else ""
        before = f"; {self.done} done before" if finished else ""
        self.say(f"{self.total} run{'s' * (self.total > 1)}{shared}, in {self.directory}{before}")

    def run_started(self, run: StudyRun, attempt: int) -> None:
        self._began[run.name] = time.monotonic()

    def run_ended(self, run: StudyRun, outcome: Outcome, again: bool) -> None:
        seconds = time.monotonic() - self._began.pop(run.name, time.monotonic())
        if outcome.kind == "done":
            self.done += 1
        elif not again:
            self.failed += 1
        if outcome.kind == "done":
            told = f"done in {describe.duration(seconds)}"
        elif self._signals.requested() and again:
            told = "saved"
        elif again:
            told = f"{outcome.text or 'stopped by a signal'}; trying again from its checkpoint"
        else:
            told = f"failed: {outcome.text or 'stopped by a signal'}"
        for note in outcome.notes:
            self.say(f"{run.name}: note: {one_line(note)}")
        self.say(f"[{self.done + self.failed}/{self.total}] {run.name}: {one_line(told)}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)


class SweepBars(SweepNarrator):
    """A bar for the whole and one for each run at work, on `console`; they disappear when the study ends."""

    def __init__(self, signals: Signals, directory: Path, again: str, console: Console) -> None:
        super().__init__(signals, directory, again)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            console=console,
            transient=True,
            refresh_per_second=2,  # more costs the runs
            expand=True,
        )
        self._whole = self._progress.add_task("", total=None)
        self._bars: dict[str, tuple[StudyRun, TaskID]] = {}
        self._looked = 0.0

    def __enter__(self) -> "SweepBars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def run_started(self, run: StudyRun, attempt: int) -> None:
        super().run_started(run, attempt)
        self._bars[run.name] = run, self._progress.add_task(run.name, total=1.0)
        self._show()

    def run_ended(self, run: StudyRun, outcome: Outcome, again: bool) -> None:
        if run.name in self._bars:
            self._progress.remove_task(self._bars.pop(run.name)[1])
        super().run_ended(run, outcome, again)
        self._show()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._show()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def _show(self) -> None:
        begun = 0.0
        for run, bar in self._bars.values():
            done = share(self.directory, run)
            begun += done
            self._progress.update(bar, completed=done)
        stopping = "saving, then stopping: " if self._signals.requested() else ""
        self._progress.update(
            self._whole,
            total=self.total,
            completed=self.done + self.failed + begun,
            description=f"{stopping}{self.counts()}, {len(self._bars)} running",
        )
