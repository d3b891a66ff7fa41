"""memory="shared" in fp32 and in half precision: as exact as plain, against fp64."""

import statistics
from collections.abc import Callable

import pytest
import torch
from dense_shared_cases import INIT_WIDTH, assert_close, images, make, step
from torch import nn


def compare(
    run: Callable[[nn.Module, nn.Module, torch.Tensor, torch.Tensor], float],
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """plain's error, and shared's over it: what `run` says of each against the network in fp64, over sixteen batches.

    Medians: both err by roundings, of which a batch may make either the larger, in fp32 up to 3 times; in fp16 the two
    agree within 1 % but for the batch in which one of them takes a value to the other side of a ReLU, up to 11 times.
    """
    truth, networks = make("plain"), [make(memory).to(dtype) for memory in ("plain", "shared")]
    errors: list[list[float]] = [[], []]
    for seed in range(16):
        for network in (truth, *networks):
            network.zero_grad()
        expected = step(truth, images(seed))
        for network, found in zip(networks, errors, strict=True):
            found.append(run(network, truth, expected, images(seed).to(dtype)))
    plain, shared = errors
    return statistics.median(plain), statistics.median(b / a for a, b in zip(plain, shared, strict=True))


def off(network: nn.Module, truth: nn.Module, factor: float = 1.0) -> float:
    """Relative, the mean over parameters of their gradients' errors."""
    pairs = zip(network.parameters(), truth.parameters(), strict=True)
    return statistics.fmean(float((factor * p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)


def test_fp32_is_as_exact_as_plain():
    def run(network, truth, expected, x):
        step(network, x)
        return off(network, truth)

    plain, ratio = compare(run)
    assert plain < 1e-4  # the network is well conditioned: what follows says something
    assert ratio < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Errors against fp64 no larger than plain's under the same autocast."""

    def run(network, truth, expected, x):
        with torch.autocast("cpu", dtype):
            logits = network(x)
        assert logits.dtype == torch.float32
        assert all(buffer.dtype == torch.float32 for name, buffer in network.named_buffers() if "running" in name)
        (logits.float().square().sum() * 2**-4).backward()  # within fp16's range
        assert all(p.grad.dtype == torch.float32 for p in network.parameters())
        return off(network, truth, 16) + float((logits.detach() - expected).norm() / expected.norm())

    plain, ratio = compare(run)
    assert plain < 0.5
    assert ratio < 1.1  # 1.00 was measured for either, in the median of batches


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_whole_network_in_half_precision(dtype):
    def run(network, truth, expected, x):
        logits = step(network, x)
        assert all(p.grad.dtype == dtype for p in network.parameters())
        assert {buffer.dtype for buffer in network.buffers()} == {dtype, torch.int64}
        return float((logits - expected).norm() / expected.norm())

    plain, ratio = compare(run, dtype)
    assert plain < 0.3
    assert ratio < 1.5


def test_autocast_leaves_fp64_alone():
    def run(network):
        with torch.autocast("cpu", torch.bfloat16):
            return network.eval()(images())

    assert run(make("shared")).dtype == run(make("plain")).dtype


def test_backward_under_another_autocast():
    def run(network):
        network.float()
        logits = network(images().float())
        with torch.autocast("cpu", torch.bfloat16):
            logits.square().sum().backward()
        return network.double()(images()).detach()

    plain, shared = make("plain"), make("shared")
    run(plain)
    run(shared)
    for (name, p), q in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert_close(
            q[1].grad, p.grad, name, close=1e-3
        )  # fp32, magnified by BN over 4 images; bf16 would be off by 1e-2


def test_statistics_far_from_zero_keep_their_digits():
    """Features of mean 1000 and deviation 1: sums of squares would lose a variance of fp32 altogether."""
    results = []
    for memory, dtype in (("plain", torch.float64), ("shared", torch.float32)):
        network = make(memory, units=[1], growth=[4], final_transition=False).to(dtype)
        nn.init.zeros_(network.stem.weight)
        network.stem.bias = nn.Parameter(torch.full((INIT_WIDTH,), 1000.0, dtype=dtype))
        network.stem.weight.data[:, 0, 1, 1] = 1
        network(images().to(dtype))
        results.append(network.blocks[0][0].reduce.norm.running_var)
    torch.testing.assert_close(results[1].double(), results[0], rtol=1e-5, atol=0)
