"""One case, from nothing to its figures: build every provider, hold it against float64, then time those that passed."""

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import cuda, gate
from benchmarks.cases import Case
from benchmarks.harness import (
    SLOW,
    SLOW_SECONDS,
    At,
    Lap,
    Timing,
    calls_for,
    interleave,
    lap_of,
    one_call,
    quantiles,
    rounds_for,
    warm,
)
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.providers import Provider, Step
from benchmarks.stream import streams

CPU_SETS = 3
"""Sets of inputs in turn: [1120, 10000] and larger pass L3 by; small ones stay in L2, like a layer's fresh logits."""


@dataclass
class Candidate:
    """A provider on its way through a case."""

    provider: Provider
    step: Step | None = None
    first_call_s: float | None = None
    """Compiling and autotuning included; apart from every time."""
    errors: dict[str, gate.Errors | None] = field(default_factory=dict)
    refused: str | None = None
    """The gate's reason."""
    failed: str | None = None
    """The exception that it ended in, or what became of the process that it ran in before."""

    @property
    def runs(self) -> bool:
        return self.step is not None and self.refused is None and self.failed is None

    def fail(self, error: Exception, when: str = "") -> None:
        """Record what it raised: the others go on. Raises the error where the device is lost to all of them."""
        self.failed = f"{when}{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if not cuda.usable():
            raise cuda.Lost(self.failed) from error

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.provider.kind,
            "absent": self.provider.absent,
            "refused": self.refused,
            "failed": self.failed,
            "first_call_s": self.first_call_s,
            "gate": {regime: errors and errors.to_dict() for regime, errors in self.errors.items()},
        }


@dataclass
class Bench:
    """Measures the cases of one process, one after another, and says to `at` whose turn it is: "" is its own."""

    device: torch.device
    at: At = lambda name: None
    _kind: object = None
    _prepared: dict[str, Candidate] = field(default_factory=dict)
    """What was built and gated for the last case, by name: its other regime needs nothing anew."""

    def measure(
        self,
        case: Case,
        providers: Sequence[Provider],
        settings: Sequence[str],
        *,
        seconds: float,
        excluded: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """A record for each setting: the case, its streams' GB/s, and every provider's verdict and time.

        `settings` are cuda.settings on a GPU; on a CPU the one that this process was started in. `seconds` bound the
        rounds of one setting, but for the least that harness.ROUNDS says. `excluded` providers have a reason by name.
        Raises cuda.Lost where a provider leaves a device that nothing runs on.
        """
        if case.kind != self._kind:
            torch.compiler.reset()  # every shape is compiled for itself, and the limit on recompilations starts anew
            self._kind, self._prepared = case.kind, {}
        candidates = [self._candidate(case, provider, excluded or {}) for provider in providers]
        self.at("")
        sets = _sets(case, self.device)
        return [self._record(candidates, case, setting, sets, seconds) for setting in settings]

    def _candidate(self, case: Case, provider: Provider, excluded: Mapping[str, str]) -> Candidate:
        if provider.name in excluded:
            return Candidate(provider, failed=excluded[provider.name])
        if provider.name not in self._prepared:
            self.at(provider.name)
            self._prepared[provider.name] = prepare(case, provider, self.device)
        return replace(self._prepared[provider.name])

    def _record(
        self, candidates: Sequence[Candidate], case: Case, setting: str, sets: Sequence[Inputs], seconds: float
    ) -> dict[str, Any]:
        times = self._time(candidates, setting, sets[:1] if setting == cuda.GRAPH_WARM else sets, seconds)
        self.at("")
        found = streams(self.device)
        bandwidth = {name: size / quantiles(times.pop(name).laps)[1] for name, (_, size) in found.items()}
        return {
            "case": case.to_dict(),
            "setting": setting,
            "bytes": case.bytes,
            "sets": 1 if setting == cuda.GRAPH_WARM else len(sets),
            "streams_gb_s": {name: value / 1e9 for name, value in bandwidth.items()},
            "providers": {
                c.provider.name: c.to_dict()
                | {"time": times[c.provider.name].to_dict() if c.provider.name in times else None}
                for c in candidates
            },
            "laps_s": {name: timing.laps for name, timing in times.items()},
        }

    def _time(
        self, candidates: Sequence[Candidate], setting: str, sets: Sequence[Inputs], seconds: float
    ) -> dict[str, Timing]:
        """Every provider that may be timed, and the streams, in turn."""
        running = {c.provider.name: c for c in candidates if c.runs}
        laps: dict[str, Lap] = {}
        calls: dict[str, int] = {}
        lengths: dict[str, float] = {}
        for name, candidate in running.items():
            self.at(name)
            try:
                laps[name], calls[name], lengths[name] = _lap(candidate, setting, sets, self.device)
            except Exception as error:  # capture may be refused, memory may end
                candidate.fail(error, f"{setting}: ")
        for name, (run, _) in streams(self.device).items():
            laps[name], calls[name] = lap_of(run, 1), 1
            lengths[name] = warm(run, least=0.02)
        slow = {
            name: max(1, int(SLOW_SECONDS / length)) for name, length in lengths.items() if length / calls[name] > SLOW
        }
        rounds = rounds_for(sum(length for name, length in lengths.items() if name not in slow), seconds)
        times, failures = interleave(laps, rounds, most=slow, at=self.at)
        for name, failure in failures.items():
            if name not in running:
                raise failure  # a stream: there is no share without it
            running[name].fail(failure, f"{setting}: ")
        found = {}
        for name, each in times.items():
            self.at(name)
            try:
                extra = _extra(running[name], setting, sets, self.device) if name in running.keys() - slow else {}
            except Exception as error:  # as above
                running[name].fail(error, f"{setting}: ")
                continue
            found[name] = Timing(each, calls[name], extra)
        return found


def prepare(case: Case, provider: Provider, device: torch.device) -> Candidate:
    """Build and gate one provider."""
    candidate = Candidate(provider)
    if provider.absent is not None:
        return candidate
    try:
        start = time.perf_counter()
        candidate.step = provider.build()
        candidate.errors["random"] = errors = gate.measure(case, "random", provider, candidate.step, device)
        candidate.first_call_s = time.perf_counter() - start
        assert errors is not None
        candidate.refused = gate.refusal(errors, case.dtype)
        candidate.errors["near"] = gate.measure(case, "near", provider, candidate.step, device)
    except Exception as error:  # a peer that cannot compile or runs out of memory must not end the run
        candidate.fail(error)
    return candidate


def _sets(case: Case, device: torch.device) -> list[Inputs]:
    count = cuda.sets_for(case, device) if device.type == "cuda" else CPU_SETS
    return [make_inputs(case, case.regime, device, seed=seed) for seed in range(count)]


def _lap(candidate: Candidate, setting: str, sets: Sequence[Inputs], device: torch.device) -> tuple[Lap, int, float]:
    """A warmed provider's lap, its calls, and about how many seconds it takes."""
    assert candidate.step is not None
    call = one_call(candidate.step, sets)
    if device.type != "cuda":
        each = warm(call)
        calls = calls_for(each)
        return lap_of(call, calls), calls, each * calls
    if setting == cuda.PLAIN:
        each = warm(cuda.synchronized(call))
        lap, calls = cuda.plain_lap(call, each)
    else:
        lap, calls = cuda.graph_lap(call, len(sets))
        each = warm(lap) / calls
    return lap, calls, each * calls


def _extra(candidate: Candidate, setting: str, sets: Sequence[Inputs], device: torch.device) -> dict[str, float]:
    """What a call costs beside its time."""
    assert candidate.step is not None
    call = one_call(candidate.step, sets)
    if device.type == "cuda":
        if setting != cuda.PLAIN:
            return {}
        watched = cuda.kernels(call) if candidate.provider.kind == "ban_fast" else {}
        return {"peak_bytes": cuda.peak_bytes(call), **watched}
    calls = 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return {"page_faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls}
