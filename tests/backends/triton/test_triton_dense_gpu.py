"""What only a GPU can show of memory="shared" on Triton's kernels: `pytest -m gpu`. Values of a block: contract/."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ban_fast import models
from ban_fast.backends import dense_block, dense_dispatch
from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton import dense
from ban_fast.ops.dense_block import dense_block as ops_dense_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SMALL = {"units": [3, 2], "growth": [12, 33], "init_width": 40, "num_classes": 10}
"""Widths that 16 bytes divide and not."""
REMADE = 1 + 2
"""Units of either block whose hidden maps backward makes again: they read no more channels than these have."""


@contextmanager
def fp32(how: str) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = how
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def small(memory: str) -> nn.Module:
    torch.manual_seed(0)
    return models.DenseNet(**SMALL, memory=memory).cuda().to(memory_format=torch.channels_last)


def paper(memory: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create("densenet-bc-100-12", memory=memory).cuda().to(memory_format=torch.channels_last)


def images(batch: int = 8, size: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(batch, 3, size, size, generator=generator), torch.arange(batch) % 10
    return x.cuda().to(memory_format=torch.channels_last), labels.cuda()


def step(network: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits, every gradient and every running statistic."""
    network.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        logits = network(x)
    F.cross_entropy(logits.float() if dtype != torch.float64 else logits, labels).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [logits.detach(), *gradients, *(b.clone() for b in network.buffers() if b.is_floating_point())]


def mean_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """In the 2-norm, relative, averaged over tensors."""
    errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(found, exact, strict=True)]
    return sum(errors) / len(errors)


def compare(
    make: Callable[[str], nn.Module], dtype: torch.dtype, batch: int = 8, size: int = 16, batches: int = 9
) -> tuple[float, float]:
    """plain's error against plain in float64, and shared's over it: medians over some batches, in each of which a
    ReLU that rounding has flipped may make either the larger by far."""
    found: list[tuple[float, float]] = []
    for seed in range(batches):
        x, labels = images(batch, size, seed)
        exact = step(make("plain").double(), x.double(), labels, torch.float64)
        plain, shared = (mean_error(step(make(memory), x, labels, dtype), exact) for memory in ("plain", "shared"))
        found.append((plain, shared / plain))
    plains, ratios = zip(*found, strict=True)
    return statistics.median(plains), statistics.median(ratios)


def test_the_kernels_serve_a_gpu() -> None:
    assert dense_dispatch._serving(torch.empty(2, 3, device="cuda")) is dense
    assert dense_dispatch._serving(torch.empty(2, 3, device="cuda", dtype=torch.float64)) is dense_block


@pytest.mark.parametrize("how", ["ieee", "tf32"])
def test_fp32_is_as_exact_as_plain(how: str) -> None:
    with fp32(how):
        plain, ratio = compare(small, torch.float32)
    assert plain < (1e-4 if how == "ieee" else 0.1)  # well conditioned: what follows says something
    assert ratio < 1.5  # both only round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_plain(dtype: torch.dtype) -> None:
    plain, ratio = compare(small, dtype)
    assert plain < 0.5
    assert ratio < 1.2  # for chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_of_densenet_bc_100_12(dtype: torch.dtype) -> None:
    with fp32("ieee"):
        plain, ratio = compare(paper, dtype, 16, 32, batches=5)
    if dtype == torch.float32:  # roundings of 6e-8 flip ReLUs: 3e-3 to 5e-3 on a CPU
        assert plain < 2e-2
    assert ratio < 1.5  # for chance


def test_float64_is_plain_s_to_1e_10() -> None:
    x, labels = images()
    plain, shared = (step(small(m).double(), x.double(), labels, torch.float64) for m in ("plain", "shared"))
    for a, b in zip(shared, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_at_every_step(dtype: torch.dtype) -> None:
    """No atomics in the kernels; cuDNN is asked for deterministic convolutions."""
    x, labels = images(32, 32)
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        first, second = (step(small("shared"), x, labels, dtype) for _ in range(2))
    finally:
        torch.backends.cudnn.deterministic = before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_replays_to_eager_s_values(dtype: torch.dtype) -> None:
    network, (x, labels) = small("shared"), images()

    def once() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            logits = network(x)
        gradients = torch.autograd.grad(F.cross_entropy(logits.float(), labels), list(network.parameters()))
        return [logits, *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for seed in range(2, 5):
        x.copy_(images(seed=seed)[0])
        expected = [value.detach().clone() for value in once()]
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            # cuDNN may take another algorithm while a graph is captured.
            torch.testing.assert_close(
                a, b, rtol=0, atol=(0.05 if dtype == torch.bfloat16 else 1e-2) * b.abs().max().item()
            )


def test_no_host_sync_in_a_step() -> None:
    network, (x, labels) = small("shared"), images()
    step(network, x, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(network, x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_of_all_ranks_by_nccl(tmp_path: Path) -> None:
    """Of one rank, gathered and summed by NCCL: the same as without it, made as they are and in a captured graph."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        by_nccl = dist.group.WORLD.group_name
        entry, units, growth = 8, 2, 4
        x, convs, norms = torch.randn(6, entry, 8, 8, device="cuda"), [], []
        for unit in range(units):
            width = entry + unit * growth
            for shape in ((4 * growth, width, 1, 1), (growth, 4 * growth, 3, 3)):
                convs.append(0.2 * torch.randn(*shape, device="cuda"))
                norms.append(Norm(*torch.rand(2, shape[1], device="cuda"), None, None, 1e-5))
        norms.append(Norm(*torch.rand(2, entry + units * growth, device="cuda"), None, None, 1e-5))

        def answer(group: str) -> tuple[Tensor, Tensor]:
            given = x.clone().requires_grad_()
            y, _ = ops_dense_block(given, convs, norms, group=group)
            return y.detach(), torch.autograd.grad(y.square().sum(), given)[0]

        wanted = answer("")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [answer(by_nccl) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(found[-1], wanted, rtol=1e-4, atol=1e-4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = answer(by_nccl)
        graph.replay()
        torch.testing.assert_close(captured, wanted, rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def test_eval_mode_and_no_grad() -> None:
    network, plain, (x, _) = small("shared"), small("plain"), images()
    with fp32("ieee"), torch.no_grad():
        for each in (network, plain):
            each(images(seed=3)[0])  # moves running statistics
            each.eval()
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-4)  # fp32 through ten layers


def test_a_unit_is_few_launches() -> None:
    """Six kernels of ours forward, nine to twelve backward; cuDNN and autograd have theirs beside."""
    network, (x, labels) = small("shared"), images()
    step(network, x, labels)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step(network, x, labels)
        torch.cuda.synchronize()
    names = [event.name for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    units = sum(SMALL["units"])  # type: ignore[arg-type]
    assert names.count("project_kernel") == units + 1 + REMADE  # and the transition
    assert names.count("place_kernel") == units + 2  # and what enters a block
    assert names.count("unproject_kernel") == units + 1
    assert names.count("activate_kernel") == 2 * units


def test_less_memory_than_checkpoint() -> None:
    held = {}
    for memory in ("plain", "checkpoint", "shared"):
        network, (x, labels) = paper(memory), images(32, 32)
        with torch.autocast("cuda", torch.bfloat16):
            F.cross_entropy(network(x).float(), labels).backward()
            before = torch.cuda.memory_allocated()
            loss = F.cross_entropy(network(x).float(), labels)
        held[memory] = torch.cuda.memory_allocated() - before
        del loss
    assert held["shared"] < 0.5 * held["checkpoint"]
    assert held["shared"] < 0.2 * held["plain"]
