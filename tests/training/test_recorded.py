"""Steps recorded and replayed, one or several at once: the quickest is chosen, and the run is the same with any."""

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_graphs import Emulated
from small_runs import Recorder, StopAt, but_for_steps, config, digits, own

from ban_fast.config import Config, TeacherConfig
from ban_fast.training import Interrupted, recorded, run
from ban_fast.training.metrics import Meter
from ban_fast.training.recorded import NotRecorded, Recorded
from ban_fast.training.step_choice import replays_sentence

GPU = torch.device("cuda")
ENDLESS = 10**6


def recorder(device: Emulated, addresses: Callable[[], Any] = tuple) -> Recorded:
    return Recorded(lambda: device.make(lambda: None), addresses, GPU)


def test_it_warms_up_records_and_replays_one_by_one_where_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps than a window are never measured: epochs of a handful of batches."""
    device = Emulated({8: 0.1})
    device.install(monkeypatch)
    step = recorder(device)
    assert [step(recorded.WINDOW - 1) for _ in range(100)] == [1] * 100
    assert device.lines == ["step"] * recorded.WARM_UPS + ["record 1"] + ["replay 1"] * (100 - recorded.WARM_UPS)
    assert step.seconds == {}


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({4: 0.7, 8: 0.6}, 8),
        ({4: 0.6, 8: 0.7}, 4),
        ({4: 0.6, 8: 0.599}, 4),  # not worth the longer wait of a signal
        ({4: 1.0, 8: 0.995}, 1),
        ({4: 1.5, 8: 1.2}, 1),
    ],
)
def test_the_quickest_is_chosen(monkeypatch: pytest.MonkeyPatch, costs: dict[int, float], best: int) -> None:
    device = Emulated(costs)
    device.install(monkeypatch)
    step, made = recorder(device), 0
    while not step.seconds:
        made += step(ENDLESS)
    windows = recorded.TRIES * len(recorded.SIZES)
    assert made == recorded.WARM_UPS + windows * recorded.WINDOW
    sizes = [size for _ in range(recorded.TRIES) for size in recorded.SIZES]
    assert device.replays == [size for size in sizes for _ in range(recorded.WINDOW // size)]
    assert next(iter(step.seconds)) == best
    assert step.seconds == pytest.approx({1: 1e-3, **{size: cost / 1000 for size, cost in costs.items()}})
    assert [step(most) for most in (ENDLESS, best, best - 1 or 1)] == [best, best, 1]
    assert len([line for line in device.lines if line.startswith("record")]) == 3  # and none since
    assert set(step._graphs) == set(recorded.SIZES)  # to destroy one could harm the others


def test_a_window_cut_short_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulated({4: 0.5})
    device.install(monkeypatch)
    step = recorder(device)
    for _ in range(recorded.WARM_UPS + recorded.WINDOW):
        step(ENDLESS)
    assert step(recorded.WINDOW) == 4
    assert step(3) == 1  # the teacher was to see more first
    before = len(device.replays)
    while not step.seconds:
        step(ENDLESS)
    assert device.replays[before:].count(4) == recorded.TRIES * recorded.WINDOW // 4
    assert next(iter(step.seconds)) == 4


def test_a_table_that_moves_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    device, place = Emulated({4: 0.5}), [1]
    device.install(monkeypatch)
    step = recorder(device, lambda: tuple(place))
    while not step.seconds:
        step(ENDLESS)
    device.lines.clear()
    place[0] = 2
    assert [step(ENDLESS) for _ in range(3)] == [1, 4, 4]
    assert device.lines == ["step", "record 1", "record 4", "replay 4", "replay 4"]


def test_several_that_can_not_be_recorded_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps may not fit where one does; later, in a larger table's company, not even four."""
    device, place = Emulated({4: 0.5, 8: 0.1}), [1]
    device.install(monkeypatch)
    device.fails = lambda size: size > 4
    step = recorder(device, lambda: tuple(place))
    while not step.seconds:
        step(ENDLESS)
    assert list(step.seconds) == [4, 1]
    device.fails, place[0] = lambda size: size > 1, 2
    device.lines.clear()
    assert [step(ENDLESS) for _ in range(4)] == [1, 1, 1, 1]
    assert [line for line in device.lines if "record" in line] == ["record 1", "record 2"]


def test_what_can_not_be_recorded_says_why_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulated()
    device.install(monkeypatch)
    device.fails = lambda size: True
    step = recorder(device)
    for _ in range(recorded.WARM_UPS):
        step(ENDLESS)
    with pytest.raises(NotRecorded, match=r"^operation not permitted$"):
        step(ENDLESS)
    assert device.lines == ["step"] * recorded.WARM_UPS + ["record 1"]


@pytest.mark.filterwarnings("error")
def test_steps_that_wait_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They break no recording, and what torch says of them troubles nobody; other warnings do."""
    device = Emulated()
    device.install(monkeypatch)
    device.waits = True
    step = recorder(device)
    for _ in range(recorded.WARM_UPS):
        step(ENDLESS)
    with pytest.raises(NotRecorded, match="waits for the device"):
        step(ENDLESS)
    assert device.lines == ["step"] * recorded.WARM_UPS
    assert torch.cuda.get_sync_debug_mode() == 0
    loud = Recorded(lambda: device.make(lambda: warnings.warn("mind the gap", stacklevel=1)), tuple, GPU)
    with pytest.raises(UserWarning, match="mind the gap"):
        loud(ENDLESS)


def test_a_recording_that_failed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch does not put right itself: steps are made after it, and shorter ones recorded."""
    device, told = Emulated(), []
    device.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *arguments: told.append(arguments))
    device.fails = lambda size: size > 1
    step = recorder(device)
    made = [step(ENDLESS) for _ in range(40)]
    assert made == [1] * 40
    assert told == [(0, (0, 1))] * 2  # of four steps, and of eight
    device.make(lambda: None)


def test_the_first_cause_is_quoted() -> None:
    """Of a chain that ends in what the end of a broken recording raises; one that goes in circles ends too."""
    cause = ValueError("no copies to the host")
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("another, on its way")
    error.__context__.__context__ = cause
    assert recorded._first_cause(error) is cause
    assert recorded._first_cause(cause) is cause
    cause.__context__ = error
    assert recorded._first_cause(error) is cause


def test_an_interrupt_while_it_records_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Emulated()
    device.install(monkeypatch)

    def interrupted() -> None:
        raise KeyboardInterrupt

    step = recorder(device)
    for _ in range(recorded.WARM_UPS):
        step(1)
    monkeypatch.setattr(device, "make", lambda _: interrupted())
    with pytest.raises(KeyboardInterrupt):
        step(1)


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(1)])
def test_draws_on_the_host_are_not_recorded(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Any]) -> None:
    """A replay would repeat one of them: stochastic depth by `random.random() < p`, for example."""
    device = Emulated()
    device.install(monkeypatch)
    step = Recorded(draw, tuple, GPU)
    for _ in range(recorded.WARM_UPS):
        step(1)
    with pytest.raises(NotRecorded, match="draws random numbers on the host"):
        step(1)
    assert device.lines == []


def test_what_is_said_of_the_choice() -> None:
    text = "steps: 4 a replay, 0.412 ms each (1: 0.455 ms, 8: 0.41 ms)"
    assert replays_sentence({4: 0.0004123, 1: 0.000455, 8: 0.00041}) == text
    assert replays_sentence({1: 0.5}) == "steps: 1 a replay, 500 ms each"


# Whole runs

EPOCHS = 8
SETTINGS: dict[str, Callable[[], tuple[Config, dict[str, Any]]]] = {
    "live": lambda: (config("ban+l", epochs=EPOCHS, teacher=TeacherConfig(mode="live")), own()),
    "DKPP, cached": lambda: (config("dkpp", epochs=EPOCHS, teacher=TeacherConfig(mode="cache")), own()),
    "views of images": lambda: (
        digits("cwtm", epochs=12, teacher=TeacherConfig(mode="cache", cache_dtype="bf16")),
        {},
    ),
    "fp16, whose scaler skips steps": lambda: (config("ban", epochs=EPOCHS, amp="fp16"), own()),
    "a last epoch cut short": lambda: (config("ban", epochs=EPOCHS, max_steps=4 * EPOCHS - 1), own()),
}


QUICK = [*((name, 4) for name in SETTINGS), ("DKPP, cached", 2)]
REST = [(name, best) for name in SETTINGS for best in (1, 2) if (name, best) not in QUICK]


@pytest.mark.parametrize(("name", "best"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)])
def test_the_run_is_the_same_for_any_number_of_steps_a_replay(
    tmp_path: Path, graphs: Callable[[int], Emulated], name: str, best: int
) -> None:
    """Weights, every epoch's metrics, the test figures, and what an observer is told of: as of batches served."""
    settings, arguments = SETTINGS[name]()
    watching = Recorder()
    run(settings, out=tmp_path / "served", observer=watching, **arguments)
    device, observer = graphs(best), Recorder()
    results = run(settings, out=tmp_path / "replayed", observer=observer, **arguments)
    assert but_for_steps(tmp_path / "replayed") == but_for_steps(tmp_path / "served")
    assert (observer.steps, observer.started) == (watching.steps, watching.started)
    assert device.replays.count(best) * best >= 12
    assert results.generations[0]["step"] == {"mode": "graph", "reason": "for this test", "a_replay": best}
    assert [text for text in observer.messages if text.startswith(f"steps: {best} a replay, 0.5 ms each")]


@pytest.mark.parametrize("question", [21, 25, *(pytest.param(q, marks=pytest.mark.slow) for q in range(26, 48, 2))])
def test_an_interrupted_run_goes_on(tmp_path: Path, graphs: Callable[[int], Emulated], question: int) -> None:
    """A stop is honoured after the replay that is under way, with what it made saved."""
    settings, arguments = SETTINGS["DKPP, cached"]()
    run(settings, out=tmp_path / "a", **arguments)
    graphs(4)
    observer = Recorder()
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(question), observer=observer, **arguments)
    again = Recorder()
    run(settings, out=tmp_path / "b", resume=True, observer=again, **arguments)
    assert but_for_steps(tmp_path / "b") == but_for_steps(tmp_path / "a")
    assert observer.steps + again.steps == dict.fromkeys(range(3), 4 * EPOCHS)  # none was lost, none made twice


# The loss, looked at without waiting for it


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


def test_a_broken_loss_is_seen_at_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that is asked for now is not read now: nobody waits for it."""
    Emulated().install(monkeypatch)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **kwargs: zeros(*shape, **kwargs))
    meter = Meter(torch.device("cpu"))
    sums = meter._sums
    meter._sums = sums.as_subclass(OnDevice)
    sums[0], meter.images = 8.0, 4
    assert meter.was_finite()
    assert meter.arrived is None
    sums[0], meter.images = math.nan, 6
    assert meter.was_finite()
    assert meter.arrived == 2.0  # of the first question
    assert not meter.was_finite()
    assert meter.arrived is None
    assert not meter.is_finite()


def test_on_the_cpu_it_is_seen_at_once() -> None:
    meter = Meter(torch.device("cpu"))
    meter._sums[0], meter.images = 3.0, 2
    assert meter.was_finite()
    assert meter.arrived == 1.5
    meter._sums[0] = math.inf
    assert not meter.was_finite()
