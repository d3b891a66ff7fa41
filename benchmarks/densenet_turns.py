"""The turns of benchmarks.densenet: the serving processes, the rounds, and what is kept when time is over."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.harness import TIME_OVER

Entry = dict[str, Any]
WARM_UP, ROUNDS = 3, 7
LEAST_ROUNDS = 3
"""Of a measurement that was cut short: fewer say nothing."""


class ProviderFailed(Exception):
    """Says why."""


class Processes:
    """Those that serve groups of providers, until `ends` on the monotonic clock."""

    def __init__(
        self, groups: Sequence[Sequence[str]], command: Callable[[Sequence[str]], list[str]], ends: float | None
    ) -> None:
        self.ends = ends
        self._of: dict[str, subprocess.Popen[str]] = {}
        for group in groups:
            process = subprocess.Popen(
                command(group), cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._of |= dict.fromkeys(group, process)
        self._late = False
        self._timer = None if ends is None else threading.Timer(max(0.0, ends - time.monotonic()), self._be_late)
        if self._timer is not None:
            self._timer.start()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for process in set(self._of.values()):
            process.kill()
            with suppress(BrokenPipeError), process:  # which closes its pipes and waits for it
                pass

    def lap(self, provider: str, most: float | None = None) -> float:
        """Seconds of a step. ProviderFailed where it has none, as from then on, or none within `most` seconds."""
        reply = self._ask("lap", provider, most)
        return float(reply["seconds"])

    def off(self, provider: str) -> float:
        """How far off a provider's gradient is. ProviderFailed."""
        return float(self._ask("off", provider, None)["off"])

    def _ask(self, what: str, provider: str, most: float | None) -> Entry:
        process = self._of[provider]
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # that it ended is found where its answer is read
            process.stdin.write(json.dumps({"what": what, "provider": provider, "most": most}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line:
            reply: Entry = json.loads(line)
            if "failed" in reply:
                raise ProviderFailed(reply["failed"])
            return reply
        status = process.wait()
        if self._late:
            raise subprocess.TimeoutExpired(process.args, 0)
        raise subprocess.CalledProcessError(status, process.args)

    def _be_late(self) -> None:
        self._late = True
        for process in set(self._of.values()):
            process.kill()


@dataclass
class Turns:
    """Laps of all providers, in turns; what came before an end of time, or of a later phase, is kept."""

    processes: Processes
    rounds: int
    limit: float
    """A gradient that is off by more gets no time."""
    early: bool
    """Whether gradients are looked at before the rounds: on a CPU that would leave pages to the one who is timed."""
    laps: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    """The round that a provider joined in."""
    failures: dict[str, str] = field(default_factory=dict)
    offs: dict[str, float] = field(default_factory=dict)
    _number: int = 0

    def run(self, phases: Sequence[Sequence[str]]) -> dict[str, Entry]:
        """The providers of every phase join those before, for further rounds with all of them."""
        try:
            for newcomers in phases:
                self._phase(newcomers)
        except subprocess.TimeoutExpired:
            pass
        return {provider: self._entry(provider) for phase in phases for provider in phase}

    def _phase(self, newcomers: Sequence[str]) -> None:
        for provider in newcomers:
            for turn in range(WARM_UP):  # the first builds and compiles it
                self._try(provider, lambda p=provider, t=turn: self.processes.lap(p, self._most() if t == 0 else None))
            if self.early:
                self._look(provider)
        joined = [provider for provider in newcomers if provider not in self.failures]
        if not joined:
            return
        self.first |= dict.fromkeys(joined, self._number)
        self.laps |= {provider: [] for provider in joined}
        before = set(self.laps) - set(joined)
        for _ in range(self.rounds):
            for provider, laps in self.laps.items():
                self._try(provider, lambda p=provider, to=laps: to.append(self.processes.lap(p)))
            self._number += 1
        for provider in before & set(self.failures):  # whoever came through a phase keeps what it has from there
            del self.laps[provider][self._number - self.first[provider] - self.rounds :]
        if not self.early:
            for provider in joined:
                self._look(provider)

    def _most(self) -> float | None:
        """Seconds for a provider to be built in: what is left, but for the rounds that it is built for."""
        if self.processes.ends is None:
            return None
        rounds = (self.rounds + WARM_UP) * sum(laps[-1] for laps in self.laps.values() if laps)
        return max(0.1, self.processes.ends - time.monotonic() - rounds - 1)

    def _look(self, provider: str) -> None:
        self._try(provider, lambda: self.offs.__setitem__(provider, self.processes.off(provider)))

    def _try(self, provider: str, call: Callable[[], object]) -> None:
        """Its failure, once, is its own; TimeoutExpired is everyone's."""
        if provider in self.failures:
            return
        try:
            call()
        except ProviderFailed as failure:
            self.failures[provider] = str(failure)
        except subprocess.CalledProcessError as error:
            self.failures[provider] = f"its process ended with status {error.returncode}"

    def _entry(self, provider: str) -> Entry:
        laps, off, failed = self.laps.get(provider, []), self.offs.get(provider), self.failures.get(provider)
        through = len(laps) >= self.rounds and off is not None
        if failed is None and (off is None or len(laps) < min(LEAST_ROUNDS, self.rounds)):
            failed = TIME_OVER
        if through:
            failed = None  # what ended it came later
        right = failed is None and off is not None and off <= self.limit
        entry: Entry = {"off": off, "failed": failed, "laps_s": laps if right else []}
        return entry | ({"first_round": self.first[provider]} if self.first.get(provider) else {})
