"""SGD, and learning rates: functions of the step alone, with nothing to save or to shift; and one that looks back."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import OptimizerConfig

# One-cycle's shape, as in torch.optim.lr_scheduler.OneCycleLR: a rise over the first 30 %, from lr / 25, to lr / 25e4.
_RISE, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` of 0..total_steps-1.

    "step" drops at the steps nearest to its milestones' shares of `total_steps`: for the paper's 200 epochs, with the
    first step of epochs 60, 120 and 160 (counted from 0). What "plateau" takes off it is a `Plateau`'s factor.
    """
    if config.schedule in ("constant", "plateau"):
        return config.lr
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    if config.schedule == "onecycle":
        return config.lr * _onecycle(step, total_steps)
    assert config.schedule == "step", config.schedule
    drops = sum(step >= round(share * total_steps) for share in config.milestones)
    return config.lr * config.lr_decay**drops


def _onecycle(step: int, total_steps: int) -> float:
    top, end = _RISE * total_steps - 1, total_steps - 1
    if step <= top:
        return _cosine(_FIRST, 1.0, step / top if top > 0 else 1.0)
    return _cosine(1.0, _LAST, (step - max(top, 0)) / (end - max(top, 0)) if end > 0 else 0.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Fused SGD over the parameters that require gradients, weight decay on every one of them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum > 0:
        # Fused SGD allocates momentum without filling it, and a first step that the fp16 scaler skips leaves it so:
        # whatever lay in that memory would then move the weights. From zero the first step is the same as ever.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Plateau:
    """What schedule "plateau" has made of the learning rate: `lr_decay` for each epoch that brought too little.

    Too little: the validation figure did not fall below the best so far, or the one before (`plateau_against`), by
    `plateau_threshold` at least (a threshold of 0: did not fall). Other schedules leave the factor at 1.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self.factor = 1.0
        self._against = math.inf

    def observe(self, figure: float) -> None:
        """The validation figure of an epoch, the lower the better."""
        if self._config.schedule != "plateau":
            return
        threshold = self._config.plateau_threshold
        has_fallen = figure <= self._against - threshold if threshold else figure < self._against
        if not has_fallen:
            self.factor *= self._config.lr_decay
        self._against = figure if self._config.plateau_against == "previous" else min(self._against, figure)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; its key "best", of older ones, is what the next figure is compared with, best or not."""
        return {"factor": self.factor, "best": self._against}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`."""
        self.factor, self._against = state["factor"], state["best"]


def clip(config: OptimizerConfig, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Shrink the gradients, all together, to a norm of `clip_norm` where theirs is larger. No wait for the device."""
    if config.clip_norm is None:
        return
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_norm)
