"""A teacher with folded batch norms: on a GPU unless told otherwise, cached as it is live, never mixed with another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import but_for_teachers, config, digits, footprint, own
from torch import Tensor, nn

from ban_fast import models
from ban_fast.config import Config, ModelConfig, TeacherConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import run
from ban_fast.training.teacher import Frozen
from ban_fast.training.teacher_folding import answering

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WRN: dict[str, Any] = {"model": ModelConfig(name="wrn-10-1"), "epochs": 6, "limit": 48}


def teacher(mode: str = "cache", fold: str = "on", **options: Any) -> TeacherConfig:
    return TeacherConfig(mode=mode, fold=fold, **options)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [("ban", {}), ("ban+l", {"amp": "bf16"}), ("dkpp", {"channels_last": True}), ("ban", WRN)],
)
def test_cached_and_live_runs_are_the_same_bits(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    for mode in ("live", "auto"):
        settings = digits(objective, teacher=teacher(mode), **{"epochs": 8, **changes})
        results = run(settings, out=tmp_path / mode)
        assert results.generations[1]["teacher"]["batch_norm"] == "folded"
    assert but_for_teachers(footprint(tmp_path / "live")) == but_for_teachers(footprint(tmp_path / "auto"))


@pytest.mark.slow
def test_caches_of_folded_and_other_teachers_never_mix(tmp_path: Path) -> None:
    """In one place each finds its own rows, and only these: the runs are those with places of their own."""
    place = {"cache_directory": str(tmp_path / "caches")}
    for fold in ("on", "off"):
        alone = run(digits(teacher=teacher(fold=fold), **WRN), out=tmp_path / f"{fold} alone")
        shared = run(digits(teacher=teacher(fold=fold, **place), **WRN), out=tmp_path / fold)
        assert alone.generations[1]["teacher"] == shared.generations[1]["teacher"]
        assert footprint(tmp_path / f"{fold} alone") == footprint(tmp_path / fold)
    found = [json.loads(file.read_text()) for file in sorted((tmp_path / "caches").glob("*/cache.json"))]
    assert sorted(each.get("batch_norm", "") for each in found) == ["", "folded"]
    assert len({each["teacher"] for each in found}) == 1  # one network
    again = run(digits(teacher=teacher(**place), **WRN), out=tmp_path / "again")
    assert again.generations[1]["teacher"]["forward_images"] == 0


def test_a_folded_teacher_says_nearly_the_same(tmp_path: Path) -> None:
    """Rounded otherwise: the student's losses agree to what rounding comes to in six epochs."""
    losses = []
    for fold in ("on", "off"):
        run(digits(teacher=teacher("live", fold), **WRN), out=tmp_path / fold)
        lines = (tmp_path / fold / "generation-1" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train"]["loss"] for line in lines])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_auto_is_off_on_a_cpu(tmp_path: Path) -> None:
    for fold in ("auto", "off"):
        results = run(digits(teacher=teacher("live", fold), **WRN), out=tmp_path / fold)
        assert set(results.generations[1]["teacher"]) == {"mode", "dtype", "forward_images"}
    assert footprint(tmp_path / "auto") == footprint(tmp_path / "off")


def wrn() -> nn.Module:
    return models.create("wrn-10-1", 4).eval()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def settings(fold: str) -> Config:
    return config(teacher=teacher("live", fold))


def test_on_a_gpu_auto_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms become passes of their own there: a bias would be one too."""
    monkeypatch.setattr("ban_fast.training.teacher_folding.isolated", lambda _: torch.no_grad())
    monkeypatch.setattr("ban_fast.training.teacher_folding.full_precision", lambda _: torch.no_grad())
    plain = wrn()
    answer = answering(plain, settings("auto"), GPU, images)
    assert answer.is_folded
    assert not any(isinstance(module, nn.BatchNorm2d) for module in answer.network.modules())
    assert all(module.bias is None for module in answer.network.modules() if isinstance(module, nn.Conv2d))
    assert any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    for fold, device in (("off", GPU), ("auto", CPU)):
        assert answering(plain, settings(fold), device, images).network is plain
    on_cpu = answering(plain, settings("on"), CPU, images)
    assert any(module.bias is not None for module in on_cpu.network.modules() if isinstance(module, nn.Conv2d))


def test_a_head_that_begins_at_zero_is_no_misreading() -> None:
    """Nothing is trained yet where "on" is looked into first."""
    blank = wrn()
    for tensor in blank.get_submodule("classifier").parameters():
        nn.init.zeros_(tensor)
    assert answering(blank, settings("on"), CPU, images).is_folded


class Misread(nn.Module):
    """A network whose code looks at more than its input: what it reads while it is followed stays for good."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm2d(3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.norm(x) * (1 if self.calls % 2 else 5)).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "batch", "reason"),
    [
        (Misread, images, r"its logits would be off by [\d.]+, the largest being [\d.]+"),
        (wrn, None, "no batch can be made to see that it stays the same"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images, "it has no batch norm"),
    ],
)
def test_what_can_not_be_folded_stays_as_it_is(
    make: Callable[[], nn.Module], batch: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ban_fast.training.teacher_folding.isolated", lambda _: torch.no_grad())
    monkeypatch.setattr("ban_fast.training.teacher_folding.full_precision", lambda _: torch.no_grad())
    plain = make().eval()
    answer = answering(plain, settings("auto"), GPU, batch)
    assert (answer.network, answer.is_folded) == (plain, False)
    with pytest.raises(OptionError, match=f"teacher.fold: the teacher can't be folded: {reason}; use auto or off"):
        answering(make().eval(), settings("on"), CPU, batch)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


def test_asked_for_in_vain_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"teacher\.fold: the teacher can't be folded: it has no batch norm"):
        run(config(teacher=teacher()), out=tmp_path / "run", **own(model=perceptron))
    assert not (tmp_path / "run").exists()


class Moves(nn.Module):
    """A layer that updates a buffer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(1)
        return x


def test_a_folded_teacher_that_changes_is_noticed() -> None:
    plain = nn.Sequential(Moves(), nn.BatchNorm2d(3), nn.Flatten()).eval()
    answer = answering(plain, settings("on"), CPU, images)
    frozen = Frozen(plain, answer.network, is_folded=True)  # type: ignore[arg-type]
    frozen.check()
    frozen.logits(images())
    with pytest.raises(UserError, match="the teacher changed while it taught"):
        frozen.check()
