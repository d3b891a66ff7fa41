"""Batch statistics over all ranks, for networks that were written for one process."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import OptionError
from ..ops.batch_norm import batch_norm
from .densenet import DenseNet

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def share_statistics(network: nn.Module) -> None:
    """From now on the network's batch norms, in training, take their statistics over the default process group.

    In place: parameters, buffers and their names stay. nn.BatchNorm1d to 3d become `SharedBatchNorm`; DenseNets in
    memory="shared" exchange theirs once a channel by themselves; nn.SyncBatchNorm stays as it is.
    OptionError for a batch norm of any other kind, which may do more than that.
    """
    _share(network, {})


def _share(network: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    if isinstance(network, DenseNet) and network.memory == "shared":
        network.sync_statistics = True
        return
    for name, module in list(network._modules.items()):
        if module is None:
            continue
        if type(module) in _KNOWN:
            setattr(network, name, made.setdefault(module, SharedBatchNorm(cast(_BatchNorm, module))))
        elif isinstance(module, _BatchNorm) and not isinstance(module, (nn.SyncBatchNorm, SharedBatchNorm)):
            raise OptionError(
                "sync_statistics", f"the network's {type(module).__name__} is not one of torch's own; leave it out"
            )
        else:
            _share(module, made)


class SharedBatchNorm(_BatchNorm):
    """What an nn.BatchNorm is, with the batch statistics of all ranks of the default process group."""

    def __init__(self, norm: _BatchNorm) -> None:
        """Takes over parameters, buffers and mode of `norm`."""
        options: dict[str, Any] = {"affine": False, "track_running_stats": norm.track_running_stats, "device": "meta"}
        super().__init__(norm.num_features, norm.eps, norm.momentum, **options)
        self.affine, self.training = norm.affine, norm.training
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...] -> the same
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        # In eval mode ranks may see different numbers of batches: one without running statistics takes its own batch's.
        if group is None or group.size() == 1 or not self.training:
            return super().forward(x)
        y, statistics, total = batch_norm(x, self.weight, self.bias, self.eps, group=group.group_name)
        self._track(statistics, total)
        return y

    @torch.no_grad()
    def _track(self, statistics: Tensor, total: Tensor) -> None:  # [2, C], []
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor: Any = self.momentum
        if factor is None:
            factor = self.num_batches_tracked.to(statistics.dtype).reciprocal()
        mean, unbiased = statistics[0], statistics[1] * (total / (total - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        """As few dimensions as any of them takes."""
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
