"""memory="shared" in two gloo processes on the CPU: DistributedDataParallel, and batch statistics of all ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from ban_fast import models
from ban_fast.backends import dense_statistics
from ban_fast.ops.dense_block import Norm, dense_block

RANKS, STEPS, IMAGES = 2, 3, 8
EVEN, UNEVEN, ALONE = (0, 4, 8), (0, 5, 8), (0, 8, 8)
"""Which images are whose."""
JOBS = {
    "ddp": {"plain": ("plain", {}, EVEN), "shared": ("shared", {}, EVEN)},
    "option": {"shared": ("shared", {"sync_statistics": True}, UNEVEN)},
    "converted": {"shared": ("shared", {}, UNEVEN)},
    "empty": {"shared": ("shared", {"sync_statistics": True}, ALONE)},
}


def make(memory: str, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"final_transition": True, "num_classes": 5, "memory": memory, **options}
    return models.DenseNet([3, 2], [4, 4], 8, **arguments).double()


def images(step: int) -> torch.Tensor:  # of all ranks
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)


def train(network: nn.Module, forward: nn.Module, rank: slice, share: float) -> dict[str, list[torch.Tensor]]:
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, labels = images(step)[rank], (torch.arange(IMAGES) % 5)[rank]
        # DDP divides gradients by the number of ranks, so each weighs its images' losses by that.
        loss = nn.functional.cross_entropy(forward(x), labels, reduction="sum") * share
        loss.backward()
        if dist.is_initialized() and not isinstance(forward, DistributedDataParallel):
            for parameter in network.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= RANKS
        optimizer.step()
    return {
        "gradients": [p.grad for p in network.parameters()],
        "weights": [p.detach() for p in network.parameters()],
        "buffers": list(network.buffers()),
    }


def worker(rank: int, folder: str, job: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    result = {}
    for name, (memory, options, cuts) in JOBS[job].items():
        network = make(memory, **options)
        forward: nn.Module = network
        if job == "converted":  # DistributedDataParallel takes nn.SyncBatchNorm on GPUs alone
            network = forward = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        else:  # small buckets, so that there are several, and they are rebuilt in the order of the first backward
            forward = DistributedDataParallel(network, bucket_cap_mb=0.01)
        result[name] = train(network, forward, slice(cuts[rank], cuts[rank + 1]), RANKS / IMAGES)
    network.eval()  # no statistics, nothing to wait for
    if rank == 0:
        result["eval"] = network(images(9)).detach()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def spawn(folder: Path, job: str) -> list[dict]:
    multiprocessing.spawn(worker, (str(folder), job), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_equal_to_plain_in_two_processes(tmp_path):
    first, second = spawn(tmp_path, "ddp")
    for rank in (first, second):
        for kind, expected in rank["plain"].items():
            for a, b in zip(expected, rank["shared"][kind], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    for a, b in zip(first["shared"]["weights"], second["shared"]["weights"], strict=True):
        assert torch.equal(a, b)
    # Each rank has statistics of its own images.
    assert not torch.equal(first["shared"]["buffers"][0], second["shared"]["buffers"][0])


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.slow) for job in ("option", "converted", "empty")])
def test_statistics_of_all_ranks(job, tmp_path):
    """Two ranks of 5 and 3 images, or 8 and none, train as one process on all: by the option, or nn.SyncBatchNorm."""
    ranks = spawn(tmp_path, job)
    network = make("plain")
    expected = train(network, network, slice(None), 1 / IMAGES)
    for rank in ranks:
        for kind in expected:
            for a, b in zip(expected[kind], rank["shared"][kind], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ranks[0]["eval"], network.eval()(images(9)), rtol=1e-10, atol=1e-10)


def test_a_channel_s_statistics_are_communicated_once(monkeypatch):
    """Where it is produced, and not for every norm that reads it: 8 channels enter, each unit makes 16 and then 4."""
    gathered, reduced = [], []

    class Alone:
        def size(self) -> int:
            return 1

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Alone) -> None:
        gathered.append(own.numel())
        parts[0].copy_(own)

    monkeypatch.setattr(dense_statistics, "_ranks", lambda name: Alone())
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: reduced.append(total.numel()))
    block = make("plain").blocks[0]
    parts = [part for unit in block for part in (unit.reduce, unit.grow)]
    norms = [Norm(part.norm.weight, part.norm.bias, None, None, part.norm.eps) for part in parts]
    norms.append(Norm(*torch.ones(2, 20, dtype=torch.float64), None, None, 1e-5))
    gradients = []
    for group in ("all", ""):
        x = images(0)[:, :1].expand(-1, 8, -1, -1).clone().requires_grad_()
        y, _ = dense_block(x, [part.conv.weight for part in parts], norms, group=group)
        y.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert gathered == [1 + 2 * channels for channels in (8, 16, 4, 16, 4, 16, 4)]  # a count, means and variances
    assert reduced == [2 * channels for channels in (4, 16, 4, 16, 4, 16, 8)]


def test_norms_that_share_and_norms_that_do_not_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network = make("shared")
        unit = network.blocks[0][0]
        unit.reduce.norm = nn.SyncBatchNorm.convert_sync_batchnorm(unit.reduce.norm)
        network(images(0))  # one rank alone shares with nobody
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist.ProcessGroup, "size", lambda self: 2)
            with pytest.raises(ValueError, match="must share statistics with the same ranks"):
                network(images(0))
    finally:
        dist.destroy_process_group()
