"""The clock: providers in turn, round after round, in one process.

A round gives every provider one lap, in a fixed order (A, B, C, A, B, C): whatever the machine does meanwhile happens
to all of them. A lap is as many calls as last `LAP` seconds, and counts as their mean. The copies whose bandwidth is
the denominator run as laps among them.
"""

import gc
import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.gate import gradient
from benchmarks.inputs import Inputs
from benchmarks.providers import Step

WARM_UP = 0.2  # seconds a provider, before any lap
LAP = 0.005  # a clock read is 50 ns and a wake-up of the second thread 10 us
ROUNDS = (5, 41)
SLOW = 0.5  # seconds a call: beyond it a provider sits out
SLOW_SECONDS = 3.0  # what remains of the rounds after its turns took so long

TIME_OVER = "left out: the run's time was over"

Lap = Callable[[], float]
"""Runs one lap and returns its seconds a call."""
Clock = Callable[[], float]
At = Callable[[str], object]
"""Hears whose turn it is, before every one."""


@dataclass(frozen=True)
class Timing:
    """One provider's laps, seconds a call, in the order of the rounds."""

    laps: list[float]
    calls: int
    """Calls a lap."""
    extra: dict[str, float] = field(default_factory=dict)
    """page_faults: a call's; peak_bytes: beyond inputs; kernels, kernel_ms: a call's, on a GPU."""

    def to_dict(self) -> dict[str, Any]:
        p20, median, p80 = quantiles(self.laps)
        return {
            "ms": median * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "rounds": len(self.laps),
            "calls": self.calls,
            **self.extra,
        }


class TookTooLong(BaseException):
    """As a KeyboardInterrupt: what is interrupted shall not take it for a failure of its own."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """TookTooLong after so many seconds, wherever Python code is by then; main thread only. None: no limit."""
    if seconds is None:
        yield
        return

    def interrupt(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def quantiles(laps: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(laps) < 2:
        return laps[0], laps[0], laps[0]
    cuts = statistics.quantiles(laps, n=10, method="inclusive")
    return cuts[1], statistics.median(laps), cuts[7]


def interleave(
    laps: Mapping[str, Lap], rounds: int, *, most: Mapping[str, int] | None = None, at: At | None = None
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Every lap once a round, in the mapping's order, with the garbage collector at rest.

    Returns the times of those that came through, and what ended the others. Some have so many turns at `most`.
    """
    times: dict[str, list[float]] = {name: [] for name in laps}
    failures: dict[str, Exception] = {}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, lap in laps.items():
                if name in failures or (most is not None and number >= most.get(name, rounds)):
                    continue
                if at is not None:
                    at(name)
                try:
                    times[name].append(lap())
                except Exception as error:  # memory may end, and the others go on
                    failures[name] = error
    finally:
        gc.enable()
    return {name: each for name, each in times.items() if name not in failures}, failures


def rounds_for(round_seconds: float, seconds: float, within: tuple[int, int] | None = None) -> int:
    """How many rounds of that length fit, within these bounds, or `ROUNDS`."""
    low, high = within or ROUNDS
    return max(low, min(high, math.floor(seconds / round_seconds))) if round_seconds > 0 else high


def one_call(step: Step, sets: Sequence[Inputs]) -> Callable[[], Tensor]:
    """A call from logits to d loss / d logits on the next set of inputs; what it allocates it frees."""
    following = itertools.cycle(sets)
    return lambda: gradient(step, next(following))[1]


def warm(call: Callable[[], object], clock: Clock = time.perf_counter, least: float = WARM_UP) -> float:
    """Call it for `least` seconds, twice at least but where it is slow; returns a late call's seconds."""
    begin = clock()
    last = math.inf
    for count in itertools.count(1):
        start = clock()
        call()
        end = clock()
        last = min(last, end - start) if count > 1 else last
        if count > 1 and end - begin >= least:
            return last
        if end - start > SLOW:  # and warm: the gate has called it before
            return end - start
    raise AssertionError("count() ended")


def calls_for(seconds: float) -> int:
    """How many calls of that length make a lap."""
    return max(1, math.ceil(LAP / seconds)) if seconds > 0 else 1


def lap_of(call: Callable[[], object], calls: int, clock: Clock = time.perf_counter) -> Lap:
    """A lap by the wall clock."""

    def lap() -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    return lap
