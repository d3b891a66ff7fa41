"""Schedules against torch's own and the paper's epochs; SGD that a skipped first step leaves alone."""

import math

import pytest
import torch
from torch import nn

from ban_fast.config import OptimizerConfig
from ban_fast.training.optim import Plateau, clip, learning_rate, make_optimizer


def rates(total: int, **settings: object) -> list[float]:
    config = OptimizerConfig(**settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("steps_per_epoch", [1, 11, 390, 391])
def test_the_papers_drops_fall_on_epochs_60_120_and_160(steps_per_epoch: int) -> None:
    values = rates(200 * steps_per_epoch)
    drops = [step for step in range(1, len(values)) if values[step] != values[step - 1]]
    assert drops == [60 * steps_per_epoch, 120 * steps_per_epoch, 160 * steps_per_epoch]
    assert [values[0], *(values[step] for step in drops)] == pytest.approx([0.1, 0.02, 0.004, 0.0008], rel=1e-12)


def torch_schedule(make: object, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = make(optimizer)  # type: ignore[operator]
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_cosine_is_torchs(total: int) -> None:
    expected = torch_schedule(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=total), total)
    # torch's is a recurrence, whose rounding grows with the steps
    assert rates(total, lr=0.3, schedule="cosine") == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("total", [10, 33, 100])
def test_onecycle_is_torchs(total: int) -> None:
    expected = torch_schedule(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=total + 1, cycle_momentum=False), total
    )
    # one step more, so that torch's last call of step() is legal: its shape is over total + 1 steps then
    config = OptimizerConfig(lr=0.3, schedule="onecycle")
    assert [learning_rate(config, s, total + 1) for s in range(total)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 1000])
def test_onecycle_of_any_length_rises_and_falls_within_bounds(total: int) -> None:
    values = rates(total, lr=0.3, schedule="onecycle")
    assert all(math.isfinite(v) and 0 < v <= 0.3 * (1 + 1e-12) for v in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    if total >= 10:
        assert values[0] == pytest.approx(0.3 / 25)
        assert values[-1] == pytest.approx(0.3 / 25e4)


def test_constant_and_milestones_at_the_nearest_step() -> None:
    assert set(rates(5, lr=0.3, schedule="constant")) == {0.3}
    values = rates(7, lr=1.0, milestones=(0.5,), lr_decay=0.5)  # 3.5 rounds to 4
    assert values == [1, 1, 1, 1, 0.5, 0.5, 0.5]


def test_optimizer_has_the_parameters_that_train() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    optimizer = make_optimizer(OptimizerConfig(), layer.parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(layer.weight)]
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4
    assert optimizer.param_groups[0]["nesterov"] is True


def test_steps_are_those_of_plain_sgd() -> None:
    """Fused, with momentum begun at zero, against torch's default SGD: one formula, so only rounding differs."""
    torch.manual_seed(0)
    mine, plain = nn.Linear(7, 5), nn.Linear(7, 5)
    plain.load_state_dict(mine.state_dict())
    settings = OptimizerConfig(lr=0.1)
    optimizers = [
        make_optimizer(settings, mine.parameters()),
        torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    ]
    for _ in range(5):
        x = torch.randn(4, 7)
        for layer, optimizer in zip((mine, plain), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, plain.weight, rtol=1e-5, atol=1e-6)


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """The fp16 scaler skips its first steps nearly always; torch's fused SGD would then go on with momentum that it
    never filled. Memory is made dirty first, so that such momentum would be garbage."""
    layer = nn.Linear(64, 64)
    twin = nn.Linear(64, 64)
    twin.load_state_dict(layer.state_dict())
    settings = OptimizerConfig(lr=0.1)
    optimizer, reference = (make_optimizer(settings, m.parameters()) for m in (layer, twin))
    dirty = [torch.full((64, 64), 1e30) for _ in range(8)]
    del dirty
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.randn(8, 64)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(layer(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(float("inf"))
    assert torch.equal(layer.weight, twin.weight)
    assert scaler.get_scale() == 1.0
    for _ in range(2):
        scaled_step(1.0)
        reference.zero_grad()
        twin(x).square().mean().backward()
        reference.step()
    assert torch.equal(layer.weight, twin.weight)


def factors(figures: list[float], **settings: object) -> list[float]:
    plateau = Plateau(OptimizerConfig(schedule="plateau", lr_decay=0.5, **settings))  # type: ignore[arg-type]
    made = []
    for figure in figures:
        plateau.observe(figure)
        again = Plateau(OptimizerConfig(schedule="plateau", lr_decay=0.5, **settings))  # type: ignore[arg-type]
        again.restore(plateau.state())
        plateau = again
        made.append(plateau.factor)
    return made


def test_a_plateau_is_an_epoch_without_a_better_figure() -> None:
    """Better than the best, not than the one before; with a threshold, better by as much, and every little counts."""
    assert factors([9, 8, 8, 7, 7.5, 7.2, 6.9]) == [1, 1, 0.5, 0.5, 0.25, 0.125, 0.125]
    assert factors([9, 8.5, 8.1, 7.6, 7.0], plateau_threshold=0.5) == [1, 1, 0.5, 0.5, 0.5]
    assert factors([100, 110, 101, 100.6, 100], plateau_threshold=0.5) == [1, 0.5, 0.25, 0.125, 0.0625]
    assert Plateau(OptimizerConfig(schedule="cosine")).factor == 1
    cosine = Plateau(OptimizerConfig(schedule="cosine"))
    cosine.observe(1.0)
    cosine.observe(2.0)
    assert cosine.factor == 1


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_gradients_are_clipped_all_together(scale: float) -> None:
    """As if the loss had never been scaled; a smaller gradient stays as it is."""
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    optimizer = make_optimizer(OptimizerConfig(lr=1.0, momentum=0.0, nesterov=False), weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    for norm, expected in ((10.0, 2.0), (1.0, 1.0)):
        for weight in weights:
            weight.grad = None
        loss = norm * (weights[0][0] * 0.6 + weights[1][1] * 0.8)
        scaler.scale(loss).backward()
        clip(OptimizerConfig(clip_norm=2.0), optimizer, scaler)
        gradient = torch.cat([weight.grad for weight in weights if weight.grad is not None])
        torch.testing.assert_close(gradient, expected * torch.tensor([0.6, 0, 0, 0, 0.8]), rtol=1e-5, atol=0)
        scaler.step(optimizer)
        scaler.update()
    clip(OptimizerConfig(), optimizer, scaler)


def test_a_plateau_against_the_epoch_before() -> None:
    """Kim et al.'s rule: an epoch that got worse costs once, and what makes up for it costs nothing."""
    previous = {"plateau_against": "previous"}
    assert factors([100, 110, 101, 100.6, 100], plateau_threshold=0.5, **previous) == [1, 0.5, 0.5, 0.25, 0.25]
    assert factors([9, 8, 8, 7, 7.5, 7.2, 6.9], **previous) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
