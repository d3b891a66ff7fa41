"""One run of the benchmarks: which cases, until when, what came of them and what was left out."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import cases, machine, stream
from benchmarks.cases import Case
from benchmarks.session import OutOfTime, Session, WorkerFailed

Record = dict[str, Any]
# A run without --full ends within 15 minutes: no case of the losses starts after the first of these, so that loaders,
# whole steps and DenseNets have time too, and nothing goes on after the second.
MINUTES = (6.0, 13.5)
# And within 12 GB on a CPU: there are two processes, one for each allocator's settings.
PROCESS_BYTES = 6 * 10**9


def device() -> str:
    """Where this machine's runs go."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Run:
    """Measures cases on demand, each once. A context manager: its end ends the measuring processes."""

    device: str
    full: bool
    minutes: tuple[float, float] | None
    """No case starts after the first, none goes on after the second; None: no limit, but for what `until` says."""
    postponed: bool = False
    """Whether max-autotune takes part in `autotune` alone: a target has a time before minutes go into that."""
    records: list[Record] = field(default_factory=list)
    out_of_time: list[Case] = field(default_factory=list)
    failures: dict[Case, WorkerFailed] = field(default_factory=dict)
    """Cases that could not be measured at all."""
    retried: list[Case] = field(default_factory=list)
    """Cases that `autotune` has measured again."""
    _by_case: dict[Case, list[Record]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = time.monotonic()
        self._last_start = None if self.minutes is None else now + 60 * self.minutes[0]
        ends = None if self.minutes is None else now + 60 * self.minutes[1]
        most_bytes = PROCESS_BYTES if self.device == "cpu" and not self.full else None
        self._session = Session(self.device, ends=ends, most_bytes=most_bytes)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    @property
    def cases(self) -> list[Case]:
        """The plan, targets first."""
        return cases.everything(self.device) if self.full else cases.usual(self.device)

    def seconds_left(self) -> float | None:
        """Until everything is given up; None: no limit."""
        return None if self._session.ends is None else self._session.ends - time.monotonic()

    def until(self, last_start: float, ends: float) -> None:
        """No case starts after this time.monotonic(), none goes on after that; whoever had no time has another turn."""
        self._last_start, self._session.ends = last_start, ends
        self.out_of_time.clear()

    def autotuned(self, case: Case) -> bool:
        """Whether max-autotune takes part: little changes by it on a CPU, and it costs minutes on a GPU."""
        if self.postponed:
            return case in self.retried
        return self.full or (self.device == "cuda" and case in cases.autotuned())

    def settings(self, case: Case) -> list[str]:
        return self._session.settings(case)

    def measure(self, case: Case) -> list[Record]:
        """The records of a case, one a setting. OutOfTime where the run's time was over; WorkerFailed."""
        if case in self.out_of_time:
            raise OutOfTime
        if case in self.failures:
            raise self.failures[case]
        if case not in self._by_case:
            try:
                self._check_time()
                self._by_case[case] = self._session.measure(case, autotune=self.autotuned(case))
            except OutOfTime:
                self.out_of_time.append(case)
                raise
            except WorkerFailed as error:
                self.failures[case] = error
                raise
            self.records += self._by_case[case]
        return self._by_case[case]

    def autotune(self, case: Case) -> list[Record]:
        """The records of a case with max-autotune in them, in place of those there were. OutOfTime; WorkerFailed."""
        self._check_time()
        found = self._session.measure(case, autotune=True)
        before = self._by_case.get(case, [])
        place = self.records.index(before[0]) if before else len(self.records)
        self.records[place : place + len(before)] = self._by_case[case] = found
        self.retried.append(case)
        return found

    def _check_time(self) -> None:
        if self._last_start is not None and time.monotonic() > self._last_start:
            raise OutOfTime

    def left_out(self) -> list[str]:
        """What the machine could have run, and this run did not."""
        lines = cases.left_out(self.cases, self.device)
        if not all(self.autotuned(case) for case in self.cases):
            taken = ", but for the first of the targets" if self.device == "cuda" else ""
            if self.postponed:
                taken = "".join(f", but for {case.title}" for case in self.retried)
            lines.append(f"torch.compile with max-autotune{taken}")
        if self.out_of_time:
            titles = "; ".join(case.title for case in self.out_of_time)
            limit = f" (no case starts after {self.minutes[0]:.3g} minutes)" if self.minutes is not None else ""
            lines.append(f"for want of time{limit}: {titles}")
        return lines

    @property
    def peak_bytes(self) -> int:
        """The most memory that the measuring processes held, all together."""
        return sum(self._session.peak_bytes.values())

    def results(self, described: Record, checks: list[Record], *, complete: bool) -> Record:
        """What a results file holds; `described` is machine.describe at the start."""
        return {
            **described,
            "complete": complete,
            "streams_by": stream.by(torch.device(self.device)),
            "gpu_state_at_end": machine.gpu_state() if self.device == "cuda" else None,
            "peak_bytes": self.peak_bytes,
            "checks": checks,
            "left_out": self.left_out(),
            "failures": [f"{case.title}: {error}" for case, error in self.failures.items()],
            "records": [{k: v for k, v in record.items() if k != "laps_s"} for record in self.records],
        }
