"""memory="shared" in fp32 and in half precision: as exact as plain, against fp64."""

import math

import pytest
import torch
from dense_shared_cases import assert_close, images, make, step
from torch import nn


def test_fp32_is_as_exact_as_plain():
    """Against fp64 from the same bits: both err by roundings, of which a batch of images may make either the larger, up
    to 3 times; of sixteen batches the geometric mean was 1.0 to 1.2 times."""
    truth, networks = make("plain"), {memory: make(memory).float() for memory in ("plain", "shared")}
    ratios = []
    for seed in range(16):
        errors = []
        for network in (truth, *networks.values()):
            network.zero_grad()
            step(network, images(seed).to(network.stem.weight.dtype))
            pairs = zip(network.parameters(), truth.parameters(), strict=True)
            differences = [((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]
            errors.append(sum(differences) / len(differences))
        _, plain, shared = errors
        assert plain < 1e-4  # the network is well conditioned: what follows says something
        ratios.append(shared / plain)
    assert math.prod(ratios) ** (1 / len(ratios)) < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Errors against fp64 no larger than plain's under the same autocast, but for chance: 1.2 times, averaged."""
    truth = make("plain")
    expected = step(truth)
    error = {}
    for memory in ("plain", "shared"):
        network = make(memory).float()
        with torch.autocast("cpu", dtype):
            logits = network(images().float())
        assert logits.dtype == dtype
        assert all(buffer.dtype == torch.float32 for name, buffer in network.named_buffers() if "running" in name)
        (logits.float().square().sum() * 2**-4).backward()  # within fp16's range
        differences = [
            (16 * p.grad - q.grad).norm() / q.grad.norm()
            for p, q in zip(network.parameters(), truth.parameters(), strict=True)
        ]
        assert all(p.grad.dtype == torch.float32 for p in network.parameters())
        error[memory] = (
            sum(differences).item() / len(differences) + ((logits - expected).norm() / expected.norm()).item()
        )
    assert error["plain"] < 0.5
    assert error["shared"] < 1.2 * error["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_whole_network_in_half_precision(dtype):
    truth = make("plain")
    expected = step(truth)
    error = {}
    for memory in ("plain", "shared"):
        network = make(memory).to(dtype)
        logits = step(network, images().to(dtype))
        error[memory] = ((logits - expected).norm() / expected.norm()).item()
        assert all(p.grad.dtype == dtype for p in network.parameters())
        assert {buffer.dtype for buffer in network.buffers()} == {dtype, torch.int64}
    assert error["shared"] < 1.5 * error["plain"] < 0.5


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
        network.stem.bias = nn.Parameter(torch.full((8,), 1000.0, dtype=dtype))
        network.stem.weight.data[:, 0, 1, 1] = 1
        network(images().to(dtype))
        results.append(network.blocks[0][0].reduce.norm.running_var)
    torch.testing.assert_close(results[1].double(), results[0], rtol=1e-5, atol=0)
