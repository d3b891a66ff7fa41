"""What a GPU's clock needs beyond the harness: a warm and a cold L2, CUDA graphs, peak memory.

Written against torch's documentation: no GPU has run it yet.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from ban_fast.training.recorded import recover
from benchmarks.cases import Case
from benchmarks.harness import Lap, calls_for

GRAPHED_BYTES = 2**30
"""Above this a launch is nothing, and a graph a provider would hold too much memory at once."""
COLD_BYTES = 2**20
"""A tensor's, from which `MOST_SETS` are enough for a cold L2 of 80 MiB."""
GRAPHED_CALLS = 50
"""Calls in one graph at least: an event's tick of 0.5 us and a graph's launch are then nothing beside a 3 us kernel."""
COLD_L2 = 3
"""A cold L2: as many sets of inputs in turn as together have this many times its size."""
MOST_SETS = 128
"""Of inputs. Cases that would need more for a cold L2 have few bytes, and are bound by their launches."""

PLAIN = "plain"
GRAPH_COLD = "CUDA graph, L2 cold"
GRAPH_WARM = "CUDA graph, L2 warm"


class Lost(Exception):
    """An error that CUDA does not recover from, as after an access out of bounds: this process can use it no more."""


def usable() -> bool:
    """Whether work can still be given to the GPU; true where this process has none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def settings(case: Case) -> list[str]:
    """The settings that a case is measured in on a GPU."""
    if case.bytes > GRAPHED_BYTES:
        return [PLAIN]
    return [PLAIN, GRAPH_COLD, GRAPH_WARM] if case.tensor_bytes >= COLD_BYTES else [PLAIN, GRAPH_WARM]


def sets_for(case: Case, device: torch.device) -> int:
    """Sets of inputs that keep L2 cold, `MOST_SETS` at most."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, math.ceil(COLD_L2 * l2 / (2 * case.tensor_bytes)))


def plain_lap(call: Callable[[], object], seconds: float) -> tuple[Lap, int]:
    """Calls as a training loop makes them, the host's work included where it is the longer; and how many."""
    calls = max(calls_for(seconds), 10 if seconds < 0.01 else 1)

    def lap() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    return lap, calls


def graph_lap(call: Callable[[], object], sets: int) -> tuple[Lap, int]:
    """Calls captured in one graph, so that every set has its turn, timed by events around its replay; and how many."""
    calls = sets * math.ceil(GRAPHED_CALLS / sets)
    _on_side_stream(call, 3)
    with recording() as graph:
        for _ in range(calls):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def lap() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / calls

    return lap, calls


@contextmanager
def recording() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is done inside, on a stream of its own; where that can't be recorded, all is as before."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool, stream=stream):
            yield graph
    except RuntimeError:
        recover(current.device, pool, stream)
        raise


def synchronized(call: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """So many calls, waited for."""

    def wait() -> None:
        for _ in range(times):
            call()
        torch.cuda.synchronize()

    return wait


def peak_bytes(call: Callable[[], object]) -> float:
    """The most memory that one call holds beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def kernels(call: Callable[[], object]) -> dict[str, float]:
    """How many kernels one call launches, and the milliseconds they run: what is left of its time is launching.

    Nothing where the profiler cannot be used, as in most containers without CUPTI.
    """
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
        times = [event.device_time for event in found.events() if event.device_type.name == "CUDA"]
    except Exception:  # whatever a profiler raises, times were measured without it
        return {}
    return {"kernels": len(times), "kernel_ms": sum(times) * 1e-3} if times else {}


def _on_side_stream(call: Callable[[], object], times: int) -> None:
    """Calls before a capture, on a stream of their own, as torch.cuda.graph asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)
