"""A network in training on one of several ranks: its gradients become those of the whole batch while backward runs.

DistributedDataParallel divides the sum of the ranks' gradients by their number, so each rank multiplies its loss, its
part of the mean over the whole batch, by that number. It is told that every parameter is used in every step
(`find_unused_parameters=False`): true of every network here, and looking for unused ones costs a walk over the graph in
each step; a network of a user's own with parameters that its output does not depend on is refused by name instead.
`static_graph` would find those too, but it does not go with gradients that add up over micro-batches.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..errors import OptionError, UserError
from ..models.shared_statistics import share_statistics
from .distributed import Ranks


class Parallel:
    """Wraps a network for training with other ranks; alone, it changes nothing."""

    def __init__(self, network: nn.Module, ranks: Ranks, *, share: float, sync_statistics: bool) -> None:
        """`share`: of each batch's samples, this rank's; `sync_statistics`: batch statistics over all ranks.

        Rank 0's parameters and buffers become every rank's.
        """
        self.module = network
        self._network, self._ranks, self._share = network, ranks, share
        self._is_checked = ranks.is_alone
        if ranks.is_alone:
            return
        if sync_statistics:
            share_statistics(network)
        ranks.copy(network)  # with `broadcast_buffers=False` DDP leaves buffers as they are
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option's new name is not known to torch 2.11
            self.module = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]

    def part(self, is_last: bool) -> AbstractContextManager[None]:
        """Where the forward and backward of one of a batch's parts run: with the last, gradients go to the others."""
        if is_last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    @torch.no_grad()
    def finish_step(self) -> None:
        """After the last backward: buffers, batch norm's running statistics, become the mean over ranks, weighted by
        each rank's share of the samples.

        UserError for a parameter that no gradient came to, in the first step.
        """
        if self._ranks.is_alone:
            return
        if not self._is_checked:
            self._check()
        if self._buffers:
            # In fp64, so that a buffer that is the same everywhere stays what it is.
            flat = torch.cat([buffer.double().flatten() for buffer in self._buffers]).mul_(self._share)
            means = self._ranks.sum(flat).split_with_sizes([buffer.numel() for buffer in self._buffers])
            for buffer, mean in zip(self._buffers, means, strict=True):
                buffer.copy_(mean.view_as(buffer))

    def _check(self) -> None:
        self._is_checked = True
        for name, parameter in self._network.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise UserError(
                    f"the network's {name} gets no gradient, and the processes wait for each other's: freeze it "
                    "(requires_grad_(False)), or train in one process"
                )


def check_shares(config: Config, rows: int, ranks: Ranks) -> None:
    """OptionError for a batch that its processes can't share."""
    if rows < ranks.size:
        raise OptionError(
            "batch_size", f"{rows} images can't be shared by {ranks.size} processes: use fewer, or a larger batch"
        )
    if config.micro_batch_size == 1 and rows % ranks.size:
        raise OptionError(
            "micro_batch_size",
            f"must be at least 2 where {ranks.size} processes share {rows} images: some have one more than others",
        )
