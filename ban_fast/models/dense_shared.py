"""Dense blocks in memory="shared": from modules to `ops.dense_block`, and from its statistics to theirs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.dense_block import Norm, Statistics, dense_block


def through_block(
    x: Tensor,  # [B, C0, H, W]
    norms: Sequence[nn.Module],  # two of every unit, then the exit's
    convs: Sequence[nn.Conv2d],  # two of every unit, then the exit's if it has one
    sync_statistics: bool = False,
) -> Tensor:
    """What the modules by turns make of x, with concatenations: [B, out, H, W], or [B, C] without a last convolution.

    Running statistics become what they would. Norms that are nn.SyncBatchNorm take batch statistics over the ranks of
    their process group, with `sync_statistics` all do over the default one: once a channel, not once a norm.
    ValueError for modules that are not batch norms, norms that do not share with the same ranks, and one value a
    channel to take statistics of.
    """
    batch_norms = [_batch_norm(norm) for norm in norms]
    group = _group(batch_norms, sync_statistics)
    if not group and x[:, 0].numel() == 1 and any(map(_by_batch, batch_norms)):
        raise ValueError(f"batch norm needs more than 1 value per channel when training, got {list(x.shape)}")
    y, statistics = dense_block(x, [conv.weight for conv in convs], [_values(n, x) for n in batch_norms], group=group)
    with torch.no_grad():
        for i, norm in enumerate(batch_norms):
            if norm.training and norm.track_running_stats:
                _track(norm, i, statistics, empty=not group and x.shape[0] == 0)
    return y


def _batch_norm(module: nn.Module) -> nn.BatchNorm2d | nn.SyncBatchNorm:
    if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise ValueError(
            f'memory="shared" needs nn.BatchNorm2d or nn.SyncBatchNorm, got {type(module).__name__}; use "checkpoint"'
        )
    return module


def _by_batch(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _group(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm], sync_statistics: bool) -> str:
    """The name of the process group over which statistics are shared; "" where they are this rank's."""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    groups = set()
    for norm in norms:
        if norm.training:
            group = norm.process_group if isinstance(norm, nn.SyncBatchNorm) else None
            if group is None and (sync_statistics or isinstance(norm, nn.SyncBatchNorm)):
                group = dist.group.WORLD
            groups.add("" if group is None or group.size() == 1 else group.group_name)
    if len(groups) > 1:
        raise ValueError('norms of one block in memory="shared" must share statistics with the same ranks')
    return groups.pop() if groups else ""


def _values(norm: nn.BatchNorm2d | nn.SyncBatchNorm, x: Tensor) -> Norm:
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if weight is None or bias is None:  # affine=False
        weight, bias = x.new_ones(norm.num_features), x.new_zeros(norm.num_features)
    mean, var = (None, None) if _by_batch(norm) else (norm.running_mean, norm.running_var)
    return Norm(weight, bias, mean, var, norm.eps)


def _track(norm: nn.BatchNorm2d | nn.SyncBatchNorm, index: int, statistics: Statistics, *, empty: bool) -> None:
    """Running statistics of norm number `index` of a block, as nn.BatchNorm2d moves them."""
    factor: Tensor | float | None = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = norm.num_batches_tracked.to(statistics.total.dtype).reciprocal()
    if empty:  # counted, and nothing to learn from
        return
    mean, var = statistics.hidden[index // 2] if index % 2 else statistics.features[:, : norm.num_features]
    unbiased = var * (statistics.total / (statistics.total - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.lerp_(value.to(running.dtype), 0.0 if factor is None else factor)
