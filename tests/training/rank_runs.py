"""Runs for several ranks, and what one process has to do to be their equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_runs import CLASSES, IMAGES, TEST_IMAGES, Recorder, StopAt, config, deterministic, digits, network, samples
from text_runs import text_config
from torch import Tensor, nn
from torch.nn import functional as F

from ban_fast import models
from ban_fast.config import Config, TeacherConfig
from ban_fast.data import Shard, load_corpus
from ban_fast.training import Interrupted, run, run_together


class Double(nn.Module):
    """A network in fp64, whose images come in fp32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


def plain() -> nn.Module:
    """No batch norm, no dropout: a batch's gradient is the mean of its images'."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, CLASSES))


class NormInShards(nn.BatchNorm2d):
    """Normalises each of so many shards of the batch by itself; running statistics become the mean of theirs."""

    shards = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        outputs, mean, var = [], torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        for number in range(self.shards):
            own = x[Shard(number, self.shards).cut(slice(0, len(x)))]
            moved = self.running_mean.clone(), self.running_var.clone()
            outputs.append(F.batch_norm(own, *moved, self.weight, self.bias, True, self.momentum, self.eps))
            mean += moved[0] * len(own) / len(x)
            var += moved[1] * len(own) / len(x)
        self.num_batches_tracked += 1
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return torch.cat(outputs)


def in_shards(count: int) -> nn.Module:
    """`deterministic`, with batch norm by shards; its tensors have the same names."""
    network = deterministic()
    norm = NormInShards(8)
    norm.shards = count
    network[1] = norm
    return network


def densenet(memory: str) -> nn.Module:
    return models.DenseNet([2, 2], [4, 4], 8, num_classes=CLASSES, in_channels=1, memory=memory)


def unused() -> nn.Module:
    """With a layer that its output does not depend on."""
    network = plain()
    network[1].extra = nn.Linear(2, 2)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "norm": deterministic,
    "dropout": network,
    "unused": unused,
    "checkpoint": lambda: densenet("checkpoint"),
    "shared": lambda: densenet("shared"),
    "in 2 shards": lambda: in_shards(2),
    "in 4 shards": lambda: in_shards(4),
}


def short(objective: str, **changes: Any) -> Config:
    """A teacher and its student, in two epochs."""
    return config(objective, **{"generations": 1, "epochs": 2, **changes})


LIVE, KEPT = TeacherConfig(mode="live"), TeacherConfig(mode="cache")
EXACT: dict[str, tuple[str, Config]] = {
    "ban": ("plain", short("ban")),
    "cwtm": ("plain", short("cwtm")),
    "cwtm, uneven": ("plain", short("cwtm", batch_size=10)),
    "dkpp, uneven": ("plain", short("dkpp", batch_size=10)),
    "cwtm, in parts": ("plain", short("cwtm", batch_size=13, micro_batch_size=2)),
    "together": ("plain", short("ban", students=("ban+l", "cwtm"))),
    "synced": ("norm", short("ban", batch_size=18, sync_statistics=True)),
    "synced checkpoint": ("checkpoint", short("ban", sync_statistics=True, generations=0, max_steps=2)),
    "synced shared": ("shared", short("ban", sync_statistics=True, generations=0, max_steps=2)),
}
"""In fp64: any number of ranks gives what one process gives."""


def outcome(settings: Config, network: str, double: bool = False, **options: Any) -> dict[str, Any]:
    """Figures and weights of a run with a network of the caller's own, or of each of several runs."""
    make, observer = NETWORKS[network], Recorder()
    own: dict[str, Any] = {"train": samples(IMAGES, 0), "test": samples(TEST_IMAGES, 1)}
    return _outcome(settings, observer, model=(lambda: Double(make())) if double else make, **{**own, **options})


def of_digits(settings: Config, **options: Any) -> dict[str, Any]:
    """The same of a run on the digits."""
    return _outcome(settings, Recorder(), **options)


def of_text(folder: Path, double: bool = False, **options: Any) -> dict[str, Any]:
    """The same of a language model and its student on the text in `folder`: without dropout in fp64, or with it."""
    settings = text_config(folder / "corpus", generations=1, epochs=2, **options.pop("settings", {}))
    words = len(load_corpus(folder / "corpus").vocabulary)
    model = (lambda: models.WordLSTM(6, num_classes=words, dropout=0.0).double()) if double else None
    return _outcome(settings, Recorder(), model=model, **options)


def _outcome(settings: Config, observer: Recorder, **options: Any) -> dict[str, Any]:
    train = run_together if settings.students else run
    result: Any = train(settings, observer=observer, **options)
    results = result.values() if settings.students else [result]
    return {
        "records": [record for one in results for record in one.generations],
        "ensembles": [record for one in results for record in one.ensembles],
        "epochs": [record for _, record in observer.epochs],
        "weights": [network.state_dict() for one in results for network in one.models],
        "messages": observer.messages,
    }


def interrupted(settings: Config, network: str, question: int, path: Path, **options: Any) -> None:
    """A run that is told to stop when it asks for the nth time."""
    try:
        outcome(settings, network, out=path, should_stop=StopAt(question), **options)
    except Interrupted:
        return
    raise AssertionError("it came to its end")


KEPT_DIGITS = digits("cwtm", teacher=KEPT, epochs=6)
"""With a cache in files."""
RESUMED = config("dkpp")
COMPILED = short("ban", compile=True, max_steps=2)
