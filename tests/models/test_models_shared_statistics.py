"""Batch statistics over two gloo processes on the CPU, against the whole batch's in one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ban_fast import models
from ban_fast.errors import OptionError
from ban_fast.models.shared_statistics import SharedBatchNorm, share_statistics

RANKS, STEPS, IMAGES = 2, 3, 8
CUTS = {"uneven": (0, 5, 8), "empty": (0, 8, 8)}
"""Which images are whose."""


def densenet(memory: str) -> nn.Module:
    return models.DenseNet([2, 2], [4, 4], 8, num_classes=5, memory=memory)


def layers() -> nn.Module:
    """Norms of maps and of vectors; without parameters, without running statistics, with their plain mean."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(24, momentum=None, eps=1e-3),
        nn.Linear(24, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layers": layers,
    "wide resnet": lambda: models.create("wrn-10-1", 5),
    "plain": lambda: densenet("plain"),
    "checkpoint": lambda: densenet("checkpoint"),
    "shared": lambda: densenet("shared"),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def images(step: int) -> Tensor:  # of all ranks
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(network: nn.Module, forward: nn.Module, rank: slice, share: float) -> dict[str, list[Tensor]]:
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, labels = images(step)[rank], (torch.arange(IMAGES) % 5)[rank]
        # DDP divides gradients by the number of ranks, so each weighs its images' losses by that.
        (nn.functional.cross_entropy(forward(x), labels, reduction="sum") * share).backward()
        optimizer.step()
    return {
        "gradients": [p.grad for p in network.parameters()],
        "weights": [p.detach() for p in network.parameters()],
        "buffers": [buffer for _, buffer in network.named_buffers()],
    }


def worker(rank: int, folder: str, jobs: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    result = {}
    for name, cut in jobs:
        network = make(name)
        share_statistics(network)
        forward = DistributedDataParallel(network, bucket_cap_mb=0.01, broadcast_buffers=False)
        cuts = CUTS[cut]
        result[f"{name} {cut}"] = train(network, forward, slice(cuts[rank], cuts[rank + 1]), RANKS / IMAGES)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check(jobs: list[tuple[str, str]], folder: Path) -> None:
    multiprocessing.spawn(worker, (str(folder), jobs), nprocs=RANKS)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, cut in jobs:
        whole = make(name)
        expected = train(whole, whole, slice(None), 1 / IMAGES)
        for rank in ranks:
            for kind, tensors in rank[f"{name} {cut}"].items():
                for a, b in zip(tensors, expected[kind], strict=True):
                    # Some hundred roundings of 1e-16 of values that batch norm divides by small deviations.
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_on_all(tmp_path: Path) -> None:
    check([("layers", "uneven"), ("layers", "empty"), ("checkpoint", "uneven"), ("shared", "uneven")], tmp_path)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_on_all_networks(tmp_path: Path) -> None:
    check([("wide resnet", "uneven"), ("plain", "uneven"), ("shared", "empty")], tmp_path)


def test_a_network_stays_what_it_was() -> None:
    """Names, tensors and results; alone and in eval mode there is nothing to share."""
    network, x = make("layers"), images(0)
    tied = nn.ModuleDict({"a": network, "b": network[1]})
    names, weights = list(network.state_dict()), [id(p) for p in network.parameters()]
    expected = [network.train()(x), network.eval()(x)]
    again = make("layers")
    share_statistics(again)
    for mode, value in zip((True, False), expected, strict=True):
        assert torch.equal(again.train(mode)(x), value)
    share_statistics(tied)
    assert list(network.state_dict()) == names
    assert [id(p) for p in network.parameters()] == weights
    assert isinstance(network[1], SharedBatchNorm)
    assert tied["b"] is network[1]


def test_a_norm_of_another_kind_is_refused() -> None:
    class Special(nn.BatchNorm2d):
        pass

    with pytest.raises(OptionError, match="sync_statistics: the network's Special is not one of torch's own"):
        share_statistics(nn.Sequential(Special(3)))


def test_in_eval_mode_nobody_is_waited_for() -> None:
    """Ranks evaluate different numbers of batches: a norm without running statistics takes its own batch's."""
    norm = SharedBatchNorm(nn.BatchNorm2d(6, track_running_stats=False))
    x = torch.randn(4, 6, 3, 3)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        y = norm.eval()(x)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(y, nn.BatchNorm2d(6, track_running_stats=False)(x))
