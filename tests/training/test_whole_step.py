"""A whole step on static buffers gives the bits of batches served one by one, waits for nothing, says what it is."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_runs import STEPS, Recorder, StopAt, but_for_steps, config, digits, footprint, network, own
from torch.amp.grad_scaler import OptState
from torch.utils._python_dispatch import TorchDispatchMode

from ban_fast.config import Config, TeacherConfig
from ban_fast.data import KeyedLoader, MemoryLoader, TensorLoader, TextLoader
from ban_fast.errors import OptionError
from ban_fast.training import Interrupted, learner, run, step_choice, whole_step
from ban_fast.training.step_choice import StepChoice, check_step, choose_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Steps that wait for the device, or that are as large as the data say: none can be recorded.
WAITING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2"}


class Unrecorded:
    """In the place of `Recorded` where there is no GPU: each step is made as it is, from the same buffers."""

    seconds: ClassVar[dict[int, float]] = {}

    def __init__(
        self,
        step: Callable[[], None],
        addresses: Callable[[], Sequence[int]],
        device: torch.device,
        obstacle: Callable[[], str | None],
        fail_at: int = -1,
    ) -> None:
        self._step, self._addresses, self._left = step, addresses, fail_at

    def __call__(self, most: int) -> int:
        assert most > 0
        self._addresses()
        self._left -= 1
        if self._left == 0:
            raise whole_step.NotRecorded("operation not permitted when stream is capturing")
        self._step()
        return 1


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every generation is trained by whole steps."""
    monkeypatch.setattr(whole_step, "Recorded", Unrecorded)
    monkeypatch.setattr(learner, "choose_step", lambda *_: StepChoice("graph", "for this test"))


SETTINGS: dict[str, Callable[[], tuple[Config, dict[str, Any]]]] = {
    "live": lambda: (config("ban", teacher=TeacherConfig(mode="live")), own()),
    "DKPP, cached": lambda: (config("dkpp", teacher=TeacherConfig(mode="cache")), own()),
    "CWTM, its confidences": lambda: (config("cwtm", teacher=TeacherConfig(mode="cache")), own()),
    "rounded rows, parts": lambda: (
        config("cwtm", teacher=TeacherConfig(mode="cache", cache_dtype="bf16"), micro_batch_size=6),
        own(),
    ),
    "views of images": lambda: (digits("ban+l", epochs=3, teacher=TeacherConfig(mode="cache")), {}),
    "a last epoch cut short": lambda: (config("ban", max_steps=STEPS - 2), own()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_of_batches_served_one_by_one(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    settings, arguments = SETTINGS[name]()
    served = run(settings, out=tmp_path / "served", **arguments)
    request.getfixturevalue("whole")
    made = run(settings, out=tmp_path / "whole", **arguments)
    assert but_for_steps(tmp_path / "whole") == but_for_steps(tmp_path / "served")
    assert {record["step"]["mode"] for record in served.generations} == {"eager"}
    assert {record["step"]["mode"] for record in made.generations} == {"graph"}


@pytest.mark.parametrize("amp", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_in_half_precision(tmp_path: Path, request: pytest.FixtureRequest, amp: str) -> None:
    """fp16's scaler skips the first steps, for which its scale is too large, and shrinks that."""
    settings = config(amp=amp, generations=1, epochs=8)
    settings.optimizer.clip_norm = 1.0
    run(settings, out=tmp_path / "served", **own())
    request.getfixturevalue("whole")
    run(settings, out=tmp_path / "whole", **own())
    assert but_for_steps(tmp_path / "whole") == but_for_steps(tmp_path / "served")


@pytest.mark.usefixtures("whole")
def test_a_recording_that_fails_behind_the_scalers_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was made on the device, but the scaler, on the host, takes its optimizer for stepped."""

    class Broken(Unrecorded):
        def __call__(self, most: int) -> int:
            if self._left == 1:
                assert isinstance(self._step, whole_step.WholeStep)
                (inner,) = self._step._learners
                state = inner.scaler._per_optimizer_states[id(inner.optimizer)]
                state["stage"], state["found_inf_per_device"] = OptState.STEPPED, {CPU: torch.ones(1)}
            return super().__call__(most)

    settings = config(amp="fp16", generations=1, epochs=8)
    run(settings, out=tmp_path / "whole", **own())
    monkeypatch.setattr(whole_step, "Recorded", lambda *given: Broken(*given, fail_at=4))
    run(settings, out=tmp_path / "broken", **own())
    assert but_for_steps(tmp_path / "broken") == but_for_steps(tmp_path / "whole")


QUESTIONS = [3, 18, 21, *(pytest.param(q, marks=pytest.mark.slow) for q in (14, 19, 20, *range(22, 40)))]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_interrupted_run_goes_on(tmp_path: Path, question: int) -> None:
    """Begun with whole steps, resumed with them, wherever it was stopped: between steps, and in evaluations."""
    settings = config("dkpp", teacher=TeacherConfig(mode="cache"))
    run(settings, out=tmp_path / "a", **own())
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(question), **own())
    run(settings, out=tmp_path / "b", resume=True, **own())
    assert footprint(tmp_path / "b") == footprint(tmp_path / "a")


@pytest.mark.usefixtures("whole")
def test_resumed_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun with whole steps, resumed with served batches: a machine may have no GPU any more."""
    settings = config("ban")
    run(settings, out=tmp_path / "a", **own())
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(7), **own())
    monkeypatch.setattr(learner, "choose_step", choose_step)
    run(settings, out=tmp_path / "b", resume=True, **own())
    assert but_for_steps(tmp_path / "b") == but_for_steps(tmp_path / "a")


class Watch(TorchDispatchMode):
    """The names of all operations, less those of the losses' kernels for CPUs: a GPU has other kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1)
        while caller.f_globals["__name__"].startswith("torch"):
            assert caller.f_back is not None
            caller = caller.f_back
        if caller.f_globals["__name__"] != "ban_fast.backends.native":
            self.names.add(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("name", "amp"),
    [("live", "off"), ("live", "fp16"), *((name, "off") for name in list(SETTINGS)[1:3]), ("views of images", "bf16")],
)
def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, name: str, amp: str) -> None:
    """No operation hands a number to the host, and the host's counters are not moved by it."""
    watched: list[set[str]] = []
    real = whole_step.WholeStep.__call__

    def call(step: whole_step.WholeStep) -> None:
        (mine,) = step._learners
        counters = (mine.step, mine.batch, mine.images, mine.meter.images)
        on_device = int(mine.step_on_device)
        with Watch() as watch:
            real(step)
        watched.append(watch.names)
        assert counters == (mine.step, mine.batch, mine.images, mine.meter.images)
        assert int(mine.step_on_device) == on_device + 1
        (group,) = mine.optimizer.param_groups
        assert group["lr"] is mine.rate
        assert float(mine.rate) == mine.learning_rate(mine.step)

    monkeypatch.setattr(whole_step.WholeStep, "__call__", call)
    settings, arguments = SETTINGS[name]()
    settings.generations, settings.amp = 1, amp
    run(settings, **arguments)
    assert len(watched) > STEPS
    assert all({"convolution_backward", "_fused_sgd_", "index_select"} <= names for names in watched)
    assert not set.union(*watched) & WAITING


def test_a_wait_would_be_seen() -> None:
    with Watch() as watch:
        torch.ones(3)[0].item()
        torch.ones(3).nonzero()
    assert watch.names & WAITING == {"_local_scalar_dense", "nonzero"}


# What can't be recorded


def test_a_step_that_can_not_be_recorded_is_made_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    run(config(), out=tmp_path / "served", **own())
    request.getfixturevalue("whole")
    failing = lambda *arguments: Unrecorded(*arguments, fail_at=4)  # noqa: E731
    monkeypatch.setattr(whole_step, "Recorded", failing)
    observer = Recorder()
    results = run(config(), out=tmp_path / "tried", observer=observer, **own())
    assert but_for_steps(tmp_path / "tried") == but_for_steps(tmp_path / "served")
    reason = "a step can't be recorded as a CUDA graph: operation not permitted when stream is capturing"
    assert [record["step"] for record in results.generations] == [{"mode": "eager", "reason": reason}] * 3
    assert [text for text in observer.messages if reason in text]
    monkeypatch.setattr("ban_fast.training.generations.check_step", lambda *_: None)
    with pytest.raises(OptionError, match=r"step: a step can't be recorded .*; use eager"):
        run(config(step="graph"), **own())


class Elsewhere:
    """A loader whose images are not in memory."""


def text_loader() -> Any:
    return TextLoader.__new__(TextLoader)


def memory_loader() -> Any:
    loader = MemoryLoader.__new__(MemoryLoader)
    loader.shard = KeyedLoader.__init__.__kwdefaults__["shard"]
    return loader


@pytest.mark.parametrize(
    ("changes", "device", "loader", "reason"),
    [
        ({}, CPU, memory_loader(), "needs a GPU"),
        ({}, GPU, Elsewhere(), "gathers images from the device's memory"),
        ({}, CPU, text_loader(), "needs a GPU"),
        ({"students": ("ban", "cwtm")}, GPU, text_loader(), "the state that a text carries from step to step"),
    ],
)
def test_auto_says_why_not_and_graph_refuses(changes: Any, device: torch.device, loader: Any, reason: str) -> None:
    settings = config(**changes)
    choice = choose_step(settings, device, loader)
    assert choice.mode == "eager"
    assert reason in choice.reason
    check_step(settings, device, loader)
    settings.step = "graph"
    others = "auto or eager" if isinstance(loader, TextLoader) else "auto, eager or compile"  # a text's is no compile
    with pytest.raises(OptionError, match=f"step: .*{reason}.*; use {others}$"):
        check_step(settings, device, loader)


def test_graph_where_all_is_on_the_device() -> None:
    assert choose_step(config(), GPU, memory_loader()).mode == "graph"
    assert choose_step(config(students=("ban", "cwtm")), GPU, memory_loader()).mode == "graph"
    assert choose_step(config(step="graph"), GPU, memory_loader()) == StepChoice("graph", "asked for")
    assert choose_step(config(step="eager"), GPU, memory_loader()) == StepChoice("eager", "asked for")
    for settings in (config(step="compile"), config(compile=True), config(compile=True, step="compile")):
        assert choose_step(settings, GPU, memory_loader()) == StepChoice("compile", "asked for")


def test_what_is_said_of_the_choice() -> None:
    """Where there was one: on a GPU, or where the answer is not what was asked for."""
    no_gpu = StepChoice("eager", "a CUDA graph needs a GPU, and this run is on the CPU")
    assert no_gpu.sentence(config(), CPU) is None
    assert StepChoice("graph", "asked for").sentence(config(step="graph"), GPU) is None
    chosen = StepChoice("graph", "all parts of a step are on the device")
    assert chosen.sentence(config(), GPU) == "steps: graph, as all parts of a step are on the device"
    draws = StepChoice("eager", "a step can't be recorded as a CUDA graph: no")
    assert draws.sentence(config(step="graph"), GPU) == f"steps: eager, as {draws.reason}"


@pytest.mark.usefixtures("whole")
def test_a_live_teacher_sees_each_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gathered for a teacher that keeps nothing."""
    gathered = 0
    real = TensorLoader.gather

    def gather(*arguments: Any) -> Any:
        nonlocal gathered
        gathered += 1
        return real(*arguments)

    monkeypatch.setattr(TensorLoader, "gather", gather)
    run(config(teacher=TeacherConfig(mode="live")), model=network, train=own()["train"])
    assert gathered == 3 * STEPS


def test_no_two_settings_that_fight() -> None:
    for step in ("eager", "graph"):
        with pytest.raises(OptionError, match=f"compile: is step compile, and step is {step}"):
            config(compile=True, step=step).validate()
    with pytest.raises(OptionError, match="step: unknown value 'grap'; did you mean 'graph'"):
        config(step="grap").validate()


def test_a_graph_without_a_gpu_is_one_line_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        run(config(step="graph"), out=tmp_path / "run", **own())
    assert str(caught.value) == (
        "step: a CUDA graph needs a GPU, and this run is on the CPU; use auto, eager or compile"
    )
    assert not (tmp_path / "run").exists()


def test_results_say_how_steps_were_made(tmp_path: Path) -> None:
    run(config(generations=1), out=tmp_path, **own())
    records = json.loads((tmp_path / "results.json").read_text())["generations"]
    assert {record["step"]["mode"] for record in records} == {"eager"}
    assert all("needs a GPU" in record["step"]["reason"] for record in records)
    assert step_choice.EAGER == "eager"
