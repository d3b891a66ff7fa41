"""A dense block's kernels with batch statistics of two ranks, over gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import triton_dense_cases as cases
from torch import multiprocessing

from ban_fast.backends import dense_block
from ban_fast.backends.triton import dense

WIDTHS = cases.Widths(growth=5, batch=5, height=4, width=4, fixed=(3,))
IMAGES = (slice(0, 3), slice(3, 5))


def worker(rank: int, folder: str, device: str) -> None:
    """Rank 0 takes the kernels; rank 1 the other implementation, as a rank without images does."""
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    given = cases.block(WIDTHS)
    given = given._replace(x=given.x[IMAGES[rank]], grad=given.grad[IMAGES[rank]])
    implementation, place = ((dense, device), (dense_block, "cpu"))[rank]
    given = given.to(torch.device(place), torch.float32)
    found = cases.answer(implementation, given, group=dist.group.WORLD.group_name)
    torch.save(
        tuple(value.cpu() if isinstance(value, torch.Tensor) else value for value in _flat(found)), _file(folder, rank)
    )
    dist.destroy_process_group()


def _flat(found: cases.Answer) -> list[torch.Tensor]:
    saved, gradients = found.saved, found.gradients
    assert gradients.x is not None
    shared = [saved.statistics, saved.hidden_statistics, saved.total]
    summed = [g for g in (*gradients.convs, *gradients.norms) if g is not None]
    return [found.y, gradients.x, *shared, *summed]


def _file(folder: str | Path, rank: int) -> str:
    return f"{folder}/{rank}.pt"


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path: Path, device: torch.device) -> None:
    multiprocessing.spawn(worker, (str(tmp_path), device.type), nprocs=2)
    first, second = (torch.load(_file(tmp_path, rank), weights_only=True) for rank in range(2))
    whole = _flat(cases.truth(cases.block(WIDTHS)))
    # Outputs are of each rank's images, statistics of all; gradients of weights are added up, as DDP would.
    both = [
        torch.cat((a, b)) if i < 2 else a if i < 5 else a + b
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    for found, expected in zip(both, whole, strict=True):
        assert cases.error(found, expected) < 4e-6
    assert torch.equal(first[2], second[2])
