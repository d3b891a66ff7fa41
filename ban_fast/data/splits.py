"""Fixed choices among the samples of a dataset: the same for every run, whatever its seed."""

import torch
from torch import Tensor

from . import keyed

_DIVISION = 0x5EED_BA4_FA57
"""The constant that keys every choice here; another one would be another division of every dataset."""


def proportional(labels: Tensor, count: int) -> Tensor:
    """`count` positions, ascending, with each class's share as near its share of `labels` as whole samples allow."""
    rank, size = _ranks(labels)
    return _first((rank.double() + 0.5) / size, count)


def even(labels: Tensor, count: int) -> Tensor:
    """At most `count` positions, ascending, as many of each class as of any other where there are enough."""
    rank, _ = _ranks(labels)
    return _first(rank.double(), min(count, len(labels)))


def _keys(n: int) -> Tensor:
    return keyed.bits(_DIVISION, 0, torch.arange(n), keyed.SUBSET)


def _ranks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's place, from 0, in a fixed random order of its class, and the number of samples of that class."""
    n = len(labels)
    by_key = torch.argsort(_keys(n), stable=True)
    grouped = by_key[torch.argsort(labels[by_key], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.empty(n, dtype=torch.int64)
    rank[grouped] = torch.arange(n) - starts[labels[grouped]]
    return rank, counts[labels]


def _first(value: Tensor, count: int) -> Tensor:
    """The positions of the `count` lowest values, equal ones in a fixed random order; ascending."""
    by_key = torch.argsort(_keys(len(value)), stable=True)
    return by_key[torch.argsort(value[by_key], stable=True)][:count].sort().values
