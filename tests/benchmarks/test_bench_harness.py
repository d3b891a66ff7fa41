"""The clock's own logic, on a clock that these tests turn."""

import gc
import math

import pytest
import torch

from benchmarks import harness
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.test_losses import Replay

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_providers_take_turns() -> None:
    order: list[str] = []

    def lap(name: str) -> float:
        assert not gc.isenabled()
        order.append(name)
        return float(len(order))

    heard: list[str] = []
    times, failures = harness.interleave({name: lambda name=name: lap(name) for name in "ABC"}, 3, at=heard.append)
    assert order == heard == list("ABCABCABC")
    assert times == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}
    assert not failures
    assert gc.isenabled()


def test_what_is_slow_has_fewer_turns() -> None:
    times, _ = harness.interleave({"A": lambda: 1.0, "B": lambda: 2.0}, 6, most={"B": 2})
    assert times == {"A": [1.0] * 6, "B": [2.0] * 2}


def test_a_lap_that_raises_ends_its_own_turns() -> None:
    """However late: memory may run out at any time."""
    counts = iter(range(10))
    times, failures = harness.interleave({"A": lambda: 1.0, "B": lambda: 1 / (2 - next(counts)), "C": lambda: 3.0}, 5)
    assert times == {"A": [1.0] * 5, "C": [3.0] * 5}
    assert isinstance(failures["B"], ZeroDivisionError)
    assert next(counts) == 3
    assert gc.isenabled()


def test_an_interrupt_ends_everything_and_the_collector_runs_again() -> None:
    def interrupt() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.interleave({"A": interrupt}, rounds=1)
    assert gc.isenabled()


def test_a_lap_is_the_mean_of_its_calls() -> None:
    clock = Clock()
    lengths = iter([1.0, 2.0, 6.0])

    def call() -> None:
        clock.now += next(lengths)

    assert harness.lap_of(call, 3, clock)() == 3.0


@pytest.mark.parametrize(("length", "calls"), [(0.01, 20), (0.3, 2), (0.6, 1)])
def test_warm_up_lasts_and_calls_twice_at_least_but_where_it_is_slow(length: float, calls: int) -> None:
    """And what it returns leaves the first call out, where there is another."""
    clock = Clock()
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        clock.now += length if count > 1 else length + 1e-6

    assert math.isclose(harness.warm(call, clock, least=0.2), length, rel_tol=1e-5)
    assert count == calls


def test_calls_fill_a_lap_and_rounds_the_time_within_bounds() -> None:
    assert harness.calls_for(50e-6) == 100
    assert harness.calls_for(1.0) == 1
    low, high = harness.ROUNDS
    assert harness.rounds_for(10.0, seconds=2.0) == low
    assert harness.rounds_for(0.1, seconds=2.0) == 20
    assert harness.rounds_for(1e-3, seconds=2.0) == high


def test_quantiles() -> None:
    assert harness.quantiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)
    assert harness.quantiles([3.0]) == (3.0, 3.0, 3.0)


def test_a_call_goes_from_one_set_of_inputs_to_the_next() -> None:
    case = Case(objective="kd", rows=2, classes=3, dtype="fp32")
    sets = [make_inputs(case, "random", CPU, seed=seed) for seed in range(3)]
    seen: list[Inputs] = []

    def step(inputs: Inputs) -> tuple[torch.Tensor, None]:
        seen.append(inputs)
        return (inputs.student * inputs.teacher).sum(), None

    call = harness.one_call(step, sets)
    for turn in range(5):
        assert torch.equal(call(), sets[turn % 3].teacher)
    assert seen == [sets[0], sets[1], sets[2], sets[0], sets[1]]


def test_replay_reads_out_what_the_clock_said() -> None:
    replay = Replay()
    replay.load([0.25, 0.5])
    differences = []
    for _ in range(2):
        start = replay()
        differences.append(replay() - start)
    assert differences == [0.25, 0.5]
