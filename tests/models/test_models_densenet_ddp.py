"""Both memories under DistributedDataParallel, two gloo processes on the CPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from ban_fast import models


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    result = {}
    for memory in ("plain", "checkpoint"):
        torch.manual_seed(0)
        network = models.DenseNet([3, 2], [4, 4], 8, num_classes=5, memory=memory)
        # Small buckets, so that there are several, and they are rebuilt in the order of the first backward.
        parallel = DistributedDataParallel(network, find_unused_parameters=False, bucket_cap_mb=0.01)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        for i in range(3):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2 * i + rank))
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(x), torch.arange(4)).backward()
            optimizer.step()
        result[memory] = {
            "gradients": [p.grad for p in network.parameters()],
            "weights": [p.detach() for p in network.parameters()],
            "buffers": list(network.buffers()),
        }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_equal_gradients_in_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for rank in (first, second):
        for kind, expected in rank["plain"].items():
            for a, b in zip(expected, rank["checkpoint"][kind], strict=True):
                assert torch.equal(a, b), kind
    for kind in ("gradients", "weights"):
        for a, b in zip(first["checkpoint"][kind], second["checkpoint"][kind], strict=True):
            assert torch.equal(a, b), kind
    # Each rank saw images of its own: without communication the gradients above would differ, as these do.
    assert not torch.equal(first["checkpoint"]["buffers"][0], second["checkpoint"]["buffers"][0])
