"""What training says while it runs: a progress bar on a terminal, a line now and then where nobody watches."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ..config import Config
from ..report import describe
from ..training import Observer, Plan
from .quiet import one_line
from .ranks import is_first
from .signals import Signals

_SECONDS_BETWEEN_LINES = 15.0


def narrator(signals: Signals, again: str) -> "Narrator":
    """The kind that suits where output goes: a bar on stderr, or stdout, if that is a terminal; else lines on stdout.

    `again` tells how the run is continued, for a second signal, which leaves at once. Of several processes one speaks.
    """
    if not is_first():
        return Silent(signals, again)
    for stream in (sys.stderr, sys.stdout):
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            return Bar(signals, again, Console(file=stream))
    return Lines(signals, again)


class Narrator(Observer):
    """Says what happens, counts steps, and turns signals into requests to save once training has begun."""

    def __init__(self, signals: Signals, again: str) -> None:
        self.config = Config()
        self.plan: Plan | None = None
        self.generation = 0
        self.done = 0
        """Steps of this generation."""
        self.loss: float | None = None
        """Of the epoch so far, as far as it is known."""
        self._signals, self._again = signals, again

    def __enter__(self) -> "Narrator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run_started(self, config: Config, plan: Plan) -> None:
        self._signals.answer = "ask"
        self._signals.remark = f" at once; the last checkpoint stands: {self._again}"
        self.config, self.plan = config, plan
        together = f", {' and '.join(plan.students)} side by side" if plan.students else ""
        self.say(
            f"{config.model.name}, {plan.parameters:,} parameters, on {plan.device}: "
            f"{plan.generations} generation{'s' * (plan.generations > 1)} of {plan.steps:,} steps{together}"
        )

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        self.generation, self.done, self.loss = generation, done_steps, None

    def loss_arrived(self, generation: int, objective: str, loss: float) -> None:
        self.loss = loss

    def teacher_chosen(self, generation: int, text: str) -> None:
        self.say(f"{describe.generation(generation):<8} teacher {text}")

    def step(self, generation: int, done_steps: int) -> None:
        self.done = done_steps

    def generation_finished(self, generation: int, record: dict[str, Any]) -> None:
        name, seconds = describe.generation(generation), describe.duration(record["train_seconds"])
        if generation and self.plan is not None and self.plan.students:
            name += f" ({record['objective']})"
        self.say(f"{name:<8} test {describe.headline(record['test'])}, trained in {seconds}")

    def message(self, text: str) -> None:
        self.say(f"note: {one_line(text)}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        raise NotImplementedError

    def epoch(self) -> str:
        """ "BAN-1, epoch 3 of 40", and ", loss 1.23" where one learns, and it is known."""
        assert self.plan is not None
        epoch = min(self.done // self.plan.steps_per_epoch + 1, self.plan.epochs)
        loss = "" if self.loss is None or self.plan.students else f", loss {self.loss:.3g}"
        return f"{describe.generation(self.generation)}, epoch {epoch} of {self.plan.epochs}{loss}"


class Silent(Narrator):
    """Only knows how far training is."""

    def say(self, text: str) -> None:
        """Rank 0 has said it."""


class Lines(Narrator):
    """Plain lines on stdout. A reader that has gone (`| head`) ends them, not the training."""

    def __init__(self, signals: Signals, again: str) -> None:
        super().__init__(signals, again)
        self._last = time.monotonic()
        self._since: float | None = None
        self._from = 0

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        super().generation_started(generation, objective, total_steps, done_steps)
        self._since = None

    def step(self, generation: int, done_steps: int) -> None:
        super().step(generation, done_steps)
        now = time.monotonic()
        if self._since is None:  # the rate counts from the first step's end: it may have compiled
            self._since, self._from = now, done_steps
            return
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        assert self.plan is not None
        rate = (done_steps - self._from) / (now - self._since)
        left = (self.plan.steps * (self.plan.generations - generation) - done_steps) / rate
        self.say(
            f"{self.epoch()}, step {done_steps:,} of {self.plan.steps:,}: "
            f"{rate * self.plan.rows_per_step:,.0f} {self.plan.unit}/s, about {describe.duration(left)} left"
        )

    def say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)


class Bar(Narrator):
    """One bar over the steps of all generations, on `console`; it disappears when the run ends."""

    def __init__(self, signals: Signals, again: str, console: Console) -> None:
        super().__init__(signals, again)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            _Rest(self),
            console=console,
            transient=True,
            refresh_per_second=4,  # more costs training on two cores
            expand=True,
        )
        self._task = self._progress.add_task("reading the data", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def run_started(self, config: Config, plan: Plan) -> None:
        super().run_started(config, plan)
        self._progress.update(self._task, total=plan.generations * plan.steps)

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        super().generation_started(generation, objective, total_steps, done_steps)
        self._show()

    def step(self, generation: int, done_steps: int) -> None:
        super().step(generation, done_steps)
        self._show()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def _show(self) -> None:
        assert self.plan is not None
        stopping = "saving, then stopping: " if self._signals.requested() else ""
        self._progress.update(
            self._task,
            completed=self.generation * self.plan.steps + self.done,
            description=stopping + self.epoch(),
        )


class _Rest(ProgressColumn):
    """Share done, speed over the last half minute, and the time left; nothing before training begins."""

    def __init__(self, narrator: Narrator) -> None:
        super().__init__()
        self._narrator = narrator

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        done = f"{task.percentage:3.0f} %"
        if task.speed is None or task.time_remaining is None:
            return Text(done)
        plan = self._narrator.plan
        assert plan is not None
        rate = task.speed * plan.rows_per_step
        return Text(f"{done}  {rate:8,.0f} {plan.unit}/s  {describe.duration(task.time_remaining):>8} left")
