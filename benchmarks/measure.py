"""One case, from nothing to its figures: build every provider, hold it against float64, then time those that passed."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import cuda, gate
from benchmarks.cases import Case
from benchmarks.harness import Lap, Timing, calls_for, interleave, lap_of, one_call, quantiles, rounds_for, warm
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
    """The exception that it ended in."""

    @property
    def runs(self) -> bool:
        return self.step is not None and self.refused is None and self.failed is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.provider.kind,
            "absent": self.provider.absent,
            "refused": self.refused,
            "failed": self.failed,
            "first_call_s": self.first_call_s,
            "gate": {regime: errors and errors.to_dict() for regime, errors in self.errors.items()},
        }


def measure_case(
    case: Case, candidates: Sequence[Provider], device: torch.device, settings: Sequence[str], *, seconds: float
) -> list[dict[str, Any]]:
    """A record for each setting: the case, its streams' GB/s, and every provider's verdict and time.

    `settings` are cuda.settings on a GPU; on a CPU the one that this process was started in. `seconds` bound the
    rounds of one setting, but for the least that harness.ROUNDS says.
    """
    torch.compiler.reset()  # every shape is compiled for itself, and the limit on recompilations starts anew
    found = [prepare(case, provider, device) for provider in candidates]
    sets = _sets(case, device)
    records = []
    for setting in settings:
        times = _time(found, case, setting, sets, device, seconds)
        bandwidth = {name: size / quantiles(times.pop(name).laps)[1] for name, (_, size) in streams(device).items()}
        records.append(
            {
                "case": case.to_dict(),
                "setting": setting,
                "bytes": case.bytes,
                "sets": 1 if setting == cuda.GRAPH_WARM else len(sets),
                "streams_gb_s": {name: value / 1e9 for name, value in bandwidth.items()},
                "providers": {
                    c.provider.name: c.to_dict() | {"time": times[c.provider.name].to_dict()}
                    if c.provider.name in times
                    else c.to_dict() | {"time": None}
                    for c in found
                },
                "laps_s": {name: timing.laps for name, timing in times.items()},
            }
        )
    return records


def prepare(case: Case, provider: Provider, device: torch.device) -> Candidate:
    """Build and gate one provider. What it raises is its own failure, recorded: the others go on."""
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
        candidate.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return candidate


def _sets(case: Case, device: torch.device) -> list[Inputs]:
    count = cuda.sets_for(case, device) if device.type == "cuda" else CPU_SETS
    return [make_inputs(case, case.regime, device, seed=seed) for seed in range(count)]


def _time(
    found: Sequence[Candidate],
    case: Case,
    setting: str,
    sets: Sequence[Inputs],
    device: torch.device,
    seconds: float,
) -> dict[str, Timing]:
    """Every provider that may be timed, and the streams, in turn."""
    laps: dict[str, Lap] = {}
    calls: dict[str, int] = {}
    length = 0.0
    used = sets[:1] if setting == cuda.GRAPH_WARM else sets
    for candidate in found:
        if not candidate.runs:
            continue
        assert candidate.step is not None
        name = candidate.provider.name
        try:
            laps[name], calls[name], a_lap = _lap(candidate.step, used, setting, device)
        except Exception as error:  # as in prepare: capture may be refused, memory may end
            candidate.failed = f"{setting}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        length += a_lap
    for name, (run, _) in streams(device).items():
        laps[name], calls[name] = lap_of(run, 1), 1
        length += warm(run, least=0.02)
    times = interleave(laps, rounds_for(length, seconds))
    steps = {c.provider.name: c.step for c in found if c.step is not None}
    return {
        name: Timing(each, calls[name], _extra(steps[name], used, setting, device) if name in steps else {})
        for name, each in times.items()
    }


def _lap(step: Step, sets: Sequence[Inputs], setting: str, device: torch.device) -> tuple[Lap, int, float]:
    """A warmed provider's lap, its calls, and about how many seconds it takes."""
    call = one_call(step, sets)
    if device.type != "cuda":
        each = warm(call)
        calls = calls_for(each)
        return lap_of(call, calls), calls, each * calls
    each = warm(cuda.synchronized(call))
    if setting == cuda.PLAIN:
        lap, calls = cuda.plain_lap(step, sets, each)
    else:
        lap, calls = cuda.graph_lap(step, sets)
        each = warm(lap, least=0.05) / calls
    return lap, calls, each * calls


def _extra(step: Step, sets: Sequence[Inputs], setting: str, device: torch.device) -> dict[str, float]:
    call = one_call(step, sets)
    if device.type == "cuda":
        return {"peak_bytes": cuda.peak_bytes(call)} if setting == cuda.PLAIN else {}
    calls = 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return {"page_faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls}
