"""SGD, and learning rates as functions of the step alone: there is nothing to save or to shift."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config import OptimizerConfig

# One-cycle's shape, as in torch.optim.lr_scheduler.OneCycleLR: a rise over the first 30 %, from lr / 25, to lr / 25e4.
_RISE, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` of 0..total_steps-1.

    "step" drops at the steps nearest to its milestones' shares of `total_steps`: for the paper's 200 epochs, with the
    first step of epochs 60, 120 and 160 (counted from 0).
    """
    if config.schedule == "constant":
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
