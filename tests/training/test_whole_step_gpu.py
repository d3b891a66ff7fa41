"""What only a GPU can show of steps recorded as CUDA graphs: eager bits, no waits, rows that move. `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    Heard,
    Recorder,
    StopAt,
    but_for_steps,
    but_for_teachers,
    config,
    digits,
    footprint,
    network,
    own,
)

from ban_fast.config import ModelConfig, TeacherConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import Interrupted, recorded, run, run_together, whole_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("deterministic_kernels"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize(
    ("objective", "mode", "amp"),
    [
        *((objective, mode, "off") for objective in ("ban", "ban+l", "cwtm", "dkpp") for mode in ("live", "cache")),
        ("ban", "live", "bf16"),
        ("ban", "live", "fp16"),
        ("ban+l", "cache", "fp16"),
        ("dkpp", "cache", "bf16"),
    ],
)
def test_eagers_bits(tmp_path: Path, objective: str, mode: str, amp: str) -> None:
    """Weights, losses and figures of a recorded run are an eager one's."""
    for step in ("eager", "graph"):
        teacher = TeacherConfig(mode=mode)
        settings = digits(objective, epochs=6, amp=amp, teacher=teacher, step=step, device="cuda")
        results = run(settings, out=tmp_path / step)
        assert {record["step"]["mode"] for record in results.generations} == {step}
    assert but_for_steps(tmp_path / "graph") == but_for_steps(tmp_path / "eager")


@pytest.mark.parametrize(
    "options", [{"name": "wrn-10-1"}, {"name": "densenet-bc-16-4", "options": {"memory": "shared"}}]
)
def test_networks_of_the_paper(tmp_path: Path, options: dict[str, Any]) -> None:
    for step in ("eager", "graph"):
        settings = digits(epochs=3, model=ModelConfig(**options), channels_last=True, step=step, device="cuda")
        run(settings, out=tmp_path / step)
    assert but_for_steps(tmp_path / "graph") == but_for_steps(tmp_path / "eager")


def test_auto_records_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Dropout's draws, the order, the rates and a growing cache: as if nothing had happened."""
    settings = config("dkpp", device="cuda", epochs=12, teacher=TeacherConfig(mode="cache"))
    data = own(model=lambda: network()[:4].append(torch.nn.Flatten()).append(torch.nn.Linear(288, 4)))
    results = run(settings, out=tmp_path / "a", **data)
    assert [record["step"]["mode"] for record in results.generations] == ["graph"] * 3
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(40), **data)
    run(settings, out=tmp_path / "b", resume=True, **data)
    assert but_for_steps(tmp_path / "b") == but_for_steps(tmp_path / "a")


@pytest.mark.parametrize("mode", ["live", "cache"])
def test_students_side_by_side(tmp_path: Path, mode: str) -> None:
    """One graph has a step of all of them: the bits of each student's own recorded run."""
    settings = {"epochs": 6, "teacher": TeacherConfig(mode=mode), "step": "graph", "device": "cuda"}
    run_together(digits(students=("ban", "cwtm", "dkpp"), **settings), out=tmp_path / "all")
    for name in ("ban", "cwtm", "dkpp"):
        run(digits(name, **settings), out=tmp_path / name)
        one, other = (but_for_teachers(footprint(path)) for path in (tmp_path / "all" / name, tmp_path / name))
        for record in (*one["results"]["generations"], *other["results"]["generations"]):
            assert record.pop("step")["mode"] == "graph"
        assert one == other


@pytest.mark.parametrize("objective", ["ban", "cwtm"])
def test_rows_too_large_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """Brought some batches at a time, and read in place by recorded steps: the bits of a table that fits."""
    teacher = TeacherConfig(mode="cache", cache_dtype="bf16")
    for name in ("fits", "large"):
        settings = digits(objective, epochs=12, teacher=teacher, step="graph", device="cuda")
        observer = Heard()
        run(settings, out=tmp_path / name, observer=observer)
        assert ("too large for the device's memory" in observer.said[0][1]) is (name == "large")
        monkeypatch.setattr("ban_fast.training.teacher_choice.SHARE", 0)
    assert but_for_steps(tmp_path / "large") == but_for_steps(tmp_path / "fits")


def test_rows_that_move_are_recorded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is full is copied to a larger one: replays must not read the old one."""
    recordings = 0
    real = whole_step.Recorded._record

    def record(self: whole_step.Recorded, size: int) -> torch.cuda.CUDAGraph:
        nonlocal recordings
        recordings += size == 1
        return real(self, size)

    monkeypatch.setattr(whole_step.Recorded, "_record", record)
    monkeypatch.setattr("ban_fast.training.cache_store._FIRST_CAPACITY", 64)
    monkeypatch.setattr("ban_fast.training.cache_worth.Fill.most", 0)  # room is taken at once otherwise
    run(digits(epochs=12, teacher=TeacherConfig(mode="cache"), step="graph", device="cuda"), out=tmp_path / "graph")
    assert recordings > 3  # generation 0's, and several of generation 1's
    run(digits(epochs=12, teacher=TeacherConfig(mode="cache"), step="eager", device="cuda"), out=tmp_path / "eager")
    assert but_for_steps(tmp_path / "graph") == but_for_steps(tmp_path / "eager")


@pytest.mark.parametrize("best", recorded.SIZES)
def test_several_steps_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Whatever is chosen, with rows that become more and dropout's draws: eager's bits, and memory that is shared."""
    monkeypatch.setattr(recorded.Trial, "made", choosing(best))
    made: list[int] = []
    real = whole_step.Recorded.__call__

    def call(self: whole_step.Recorded, most: int) -> int:
        made.append(real(self, most))
        return made[-1]

    monkeypatch.setattr(whole_step.Recorded, "__call__", call)
    data = own(model=lambda: network()[:4].append(torch.nn.Flatten()).append(torch.nn.Linear(288, 4)))
    for step in ("eager", "graph"):
        # 24 batches an epoch: a window, and a rest that no size divides.
        settings = config("ban", device="cuda", epochs=8, batch_size=3, step=step, teacher=TeacherConfig(mode="cache"))
        run(settings, out=tmp_path / step, **data)
    assert but_for_steps(tmp_path / "graph") == but_for_steps(tmp_path / "eager")
    assert made.count(best) >= 15


def choosing(best: int) -> Callable[[recorded.Trial, int], bool]:
    """`Trial.made`, by a clock that finds this size the quickest."""
    real = recorded.Trial.made

    def made(self: recorded.Trial, steps: int) -> bool:
        settled = real(self, steps)
        if settled:
            self.best = best
            self.verdict = {best: 1e-3}
        return settled

    return made


@pytest.mark.parametrize("place", ["live", "cache", "large cache"])
def test_a_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Where it is made as it is, to warm up, and where it is replayed."""
    if place == "large cache":
        monkeypatch.setattr("ban_fast.training.teacher_choice.SHARE", 0)
    real = whole_step.Recorded.__call__

    def call(self: whole_step.Recorded, most: int) -> int:
        if not self._warm_ups and not self._graphs:
            return real(self, most)  # recording waits once
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, most)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(whole_step.Recorded, "__call__", call)
    teacher = TeacherConfig(mode=place.split()[-1])
    run(digits("dkpp", epochs=3, teacher=teacher, step="graph", device="cuda"), out=tmp_path / "run")


def test_a_broken_loss_ends_the_run() -> None:
    """Found without waiting for it: a hundred steps later, or at the epoch's end."""
    settings = digits("label", epochs=3, limit=1000, generations=0, step="graph", device="cuda")
    settings.optimizer.lr = 1e30
    with pytest.raises(UserError, match="the loss is not finite in generation 0"):
        run(settings)


class Waits(torch.nn.Module):
    """A network that asks the host for a number in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.abs().max().item() < 1e9 else self.body(0 * x)


class Synchronizes(Waits):
    """A network that waits for the device where torch does not notice: it breaks the recording."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return self.body(x)


@pytest.mark.parametrize("model", [Waits, Synchronizes])
def test_a_network_that_can_not_be_recorded(model: type[torch.nn.Module]) -> None:
    """Its steps are made as they are, dropout's draws included, and the next network's are recorded."""
    observer = Recorder()
    results = run(config(device="cuda", generations=0), observer=observer, **own(model=model))
    assert results.generations[0]["step"]["mode"] == "eager"
    assert any("can't be recorded" in text for text in observer.messages)
    assert torch.rand(3, device="cuda").isfinite().all()
    with pytest.raises(OptionError, match="step: a step can't be recorded as a CUDA graph"):
        run(config(device="cuda", generations=0, step="graph"), **own(model=model))
    results = run(config(device="cuda", generations=0, step="graph"), **own())
    assert results.generations[0]["step"]["mode"] == "graph"
