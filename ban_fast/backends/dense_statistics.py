"""Batch statistics in parts: over chunks of images, which fit the cache, and over the ranks that share them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def finish(parts: Tensor, counts: Sequence[int], group: str, out: Tensor) -> Tensor:  # [n, 2, C], n, .., [2, C] -> []
    """From mean and sum of squared distances of every part to mean and biased variance of all, in `out`.

    All is this rank's, or with a group's name all its ranks'. Returns how many values a channel then has.
    """
    if len(counts) < 2:  # without images there is no part at all
        moments = parts[0] if counts else torch.zeros_like(out)
        count = torch.full((), sum(counts), dtype=parts.dtype, device=parts.device)
    else:
        moments, count = _merge(torch.tensor(counts, dtype=parts.dtype, device=parts.device), parts)
    if group:
        ranks = _ranks(group)
        packed = torch.cat((count.view(1), moments.flatten()))
        gathered = [torch.empty_like(packed) for _ in range(ranks.size())]
        dist.all_gather(gathered, packed, group=ranks)
        every = torch.stack(gathered)
        moments, count = _merge(every[:, 0], every[:, 1:].view(-1, *moments.shape))
    out[0] = moments[0]
    torch.div(moments[1], count.clamp(min=1), out=out[1])
    return count


def _merge(counts: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:  # [n], [n, 2, C] -> [2, C], []
    """Chan, Golub and LeVeque: distances between the parts' means are squared, never the means themselves."""
    total = counts.sum()
    mean = (counts / total) @ parts[:, 0]
    m2 = parts[:, 1].sum(0) + counts @ (parts[:, 0] - mean).square()
    return torch.stack((mean, m2)), total


def sum_over_ranks(sums: Tensor, group: str) -> Tensor:
    """`sums`, over all ranks of the group, in a tensor of its own; as it is where the name is ""."""
    if not group:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=_ranks(group))
    return total


def _ranks(group: str) -> dist.ProcessGroup:
    """By the name that operators can take: torch's functional collectives find theirs so."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
