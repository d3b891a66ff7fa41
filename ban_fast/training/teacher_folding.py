"""Whether a teacher answers by a copy of itself whose batch norms are folded, which a GPU computes in less time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import OptionError
from ..models.folding import NotFolded, fold
from .evaluator import full_precision
from .seeds import isolated
from .task import Task, build

_OFF = 1e-3
"""Of the largest logit: how far a folded network's may be from its own. Rounding leaves 1e-5, a misread network 1."""


class Answering(NamedTuple):
    """What computes a teacher's logits."""

    network: nn.Module
    is_folded: bool
    reason: str
    """Why it is, or is not."""


def answering(
    network: nn.Module, config: Config, device: torch.device, images: Callable[[], Tensor] | None
) -> Answering:
    """A finished network in eval mode itself, or folded, as `config.teacher.fold` says; it is not changed.

    "auto" folds on a GPU, where each batch norm and the ReLU after it are two passes over memory, and folded one. On a
    CPU a teacher's forward pass took 0.99 to 1.1 times as long without: too little to be worth other bits. `images`
    makes a batch, to see that both say the same; None where that can't be: of a text, or from a user's DataLoader.
    OptionError where folding was asked for, and can't be.
    """
    asked = config.teacher.fold
    if asked == "off":
        return Answering(network, False, "asked for")
    on_gpu = device.type == "cuda"
    if asked == "auto" and not on_gpu:
        return Answering(network, False, "on a CPU it gains little")
    try:
        if images is None:
            raise NotFolded("no batch can be made to see that it stays the same")
        # In another pass over memory, a GPU's convolutions would add the bias that is left of a batch norm.
        folded = fold(network, into_convolutions=not on_gpu)
        _check(network, folded, images, device)
    except NotFolded as error:
        if asked == "on":
            raise OptionError("teacher.fold", f"the teacher can't be folded: {error}; use auto or off") from error
        return Answering(network, False, str(error))
    return Answering(folded, True, "asked for" if asked == "on" else "a GPU reads and writes less")


def check_fold(config: Config, task: Task) -> None:
    """OptionError, before anything is trained or written, where the folding that `config` asks for can't be."""
    if config.teacher.fold != "on" or not config.generations:
        return
    with isolated(task.device, seed=0):
        network = build(task.factory, task.shape, task.device, task.channels_last)
    answering(network.eval(), config, task.device, first_images(task))


def first_images(task: Task) -> Callable[[], Tensor] | None:
    """What makes a batch of a task's images; None where that would be a text's, or take it from a user's DataLoader."""
    return None if task.is_fixed or task.views is None else lambda: next(task.train(0).epoch(0)).images


def _check(network: nn.Module, folded: nn.Module, images: Callable[[], Tensor], device: torch.device) -> None:
    """NotFolded where a network was misread: by a value that its code takes as fixed, for example."""
    with isolated(device), full_precision(device), torch.no_grad():
        batch = images()
        own, found = network(batch), folded(batch)
    off, largest = (found - own).abs().max().item(), own.abs().max().item()
    if not off <= _OFF * largest:
        raise NotFolded(f"its logits would be off by {off:.2g}, the largest being {largest:.2g}")
