"""Dense blocks in memory="shared": from modules to `ops.dense_block`, and from its statistics to theirs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.dense_block import Norm, Statistics, dense_block

_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def through_block(
    x: Tensor,  # [B, C0, H, W]
    norms: Sequence[nn.Module],  # two of every unit, then the exit's
    convs: Sequence[nn.Conv2d],  # two of every unit, then the exit's if it has one
    sync_statistics: bool = False,
) -> Tensor:
    """What the modules by turns make of x, with concatenations: [B, out, H, W], or [B, C] without a last convolution.

    Running statistics become what they would. Norms that are nn.SyncBatchNorm take batch statistics over the ranks of
    their process group, with `sync_statistics` all do over the default one: once a channel, not once a norm.
    ValueError for modules that are not batch norms or do more than those, convolutions that are not as `DenseNet` makes
    them, norms that do not share with the same ranks, and one value a channel to take statistics of.
    """
    batch_norms = [_batch_norm(norm) for norm in norms]
    for conv in convs:
        _check_convolution(conv)
    group = _group(batch_norms, sync_statistics)
    if not group and x[:, 0].numel() == 1 and any(map(_by_batch, batch_norms)):
        raise ValueError(f"batch norm needs more than 1 value per channel when training, got {list(x.shape)}")
    y, statistics = dense_block(x, [conv.weight for conv in convs], [_values(n, x) for n in batch_norms], group=group)
    with torch.no_grad():
        _track(batch_norms, statistics, empty=not group and x.shape[0] == 0)
    return y


def _batch_norm(module: nn.Module) -> nn.BatchNorm2d | nn.SyncBatchNorm:
    # Parametrized modules are of classes of their own, which inherit `forward`.
    if not (isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and type(module).forward in _FORWARDS):
        raise ValueError(
            f'memory="shared" needs nn.BatchNorm2d or nn.SyncBatchNorm, got {type(module).__name__}; use "checkpoint"'
        )
    return module


def _check_convolution(module: nn.Module) -> None:
    """ValueError if more than its weight says what it computes."""
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        size = module.kernel_size
        same = (size[0] // 2, size[1] // 2)
        form = module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        if module.bias is None and form == ((1, 1), same, (1, 1), 1, "zeros"):
            return
    raise ValueError(
        'memory="shared" needs nn.Conv2d without bias, stride, dilation or groups, padded with zeros to the size that '
        f'it was, got {module}; use "checkpoint"'
    )


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
    if weight is None:
        weight = x.new_ones(norm.num_features)
    if bias is None:
        bias = x.new_zeros(norm.num_features)
    mean, var = (None, None) if _by_batch(norm) else (norm.running_mean, norm.running_var)
    return Norm(weight, bias, mean, var, norm.eps)


def _track(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm], statistics: Statistics, *, empty: bool) -> None:
    """Running statistics of a block's norms, as nn.BatchNorm2d moves them. All of one momentum move at once: launches
    for each norm would be more than the block's own."""
    tracking = [(i, norm) for i, norm in enumerate(norms) if norm.training and norm.track_running_stats]
    counts = [norm.num_batches_tracked for _, norm in tracking if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    if empty:  # counted, and nothing to learn from
        return
    correction = statistics.total / (statistics.total - 1)
    features = statistics.features[0], statistics.features[1] * correction
    hidden = statistics.hidden[:, 0], statistics.hidden[:, 1] * correction
    moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for i, norm in tracking:
        for j, running in enumerate((norm.running_mean, norm.running_var)):
            if running is None:
                continue
            value = (hidden[j][i // 2] if i % 2 else features[j][: norm.num_features]).to(running.dtype)
            if norm.momentum is None and norm.num_batches_tracked is not None:
                running.lerp_(value, norm.num_batches_tracked.to(running.dtype).reciprocal())
                continue
            group = moved.setdefault(norm.momentum or 0.0, ([], []))
            group[0].append(running)
            group[1].append(value)
    for momentum, (running_values, values) in moved.items():
        torch._foreach_lerp_(running_values, values, momentum)
