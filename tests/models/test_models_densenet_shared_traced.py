"""memory="shared" as operators: opcheck, torch.compile in one graph, export, the meta device."""

import functools

import pytest
import torch
from torch import nn

from ban_fast import models


def make(memory: str = "shared", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return models.DenseNet([2, 1], [4, 5], 8, num_classes=5, memory=memory).to(dtype)


def images(dtype: torch.dtype = torch.float64, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def operands(fixed: bool, exit_conv: bool) -> tuple:
    """Arguments of ban_fast::dense_block for one unit: 6 channels, 8 in between, 2 more."""
    shapes = [(8, 6, 1, 1), (2, 8, 3, 3), *([(3, 8, 1, 1)] if exit_conv else [])]
    widths = (6, 8, 8)
    draw = functools.partial(torch.randn, dtype=torch.float64)
    means, variances = ([draw(width).square() if fixed else None for width in widths] for _ in range(2))
    return (
        draw(4, 6, 3, 5),
        [draw(shape) for shape in shapes],
        [draw(width) for width in widths],
        [draw(width) for width in widths],
        means,
        variances,
        [1e-5] * 3,
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("exit_conv", [False, True])
def test_operators(fixed, exit_conv):
    torch.manual_seed(0)
    x, convs, *norms = operands(fixed, exit_conv)
    for keep in (False, True):
        torch.library.opcheck(torch.ops.ban_fast.dense_block.default, (x, convs, *norms), {"group": "", "keep": keep})
    y, *saved = torch.ops.ban_fast.dense_block(x, convs, *norms, group="", keep=True)
    needs = True, [True, False, True][: len(convs)], [False, True, True]
    arguments = (torch.randn_like(y), *saved, convs, *norms, *needs)
    torch.library.opcheck(torch.ops.ban_fast.dense_block_backward.default, arguments, {"group": ""})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [True, False])
def test_compiled(backend, mode, tmp_path, monkeypatch):
    """One graph; two steps, so that running statistics have moved by the graph."""
    torch._dynamo.reset()
    # Inductor keeps graphs on disk by what is called: one of another version has that one's layout of the features.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, network = make().train(mode), make().train(mode)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for _ in range(2):
        expected, logits = eager(images()), compiled(images())
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        expected.square().sum().backward()
        logits.square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for p, q in zip(eager.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_compiled_and_used_twice(context):
    """In one backward, or without gradients; statistics move twice."""
    torch._dynamo.reset()
    eager, network = make(), make()
    results = []
    for forward in (eager, torch.compile(network, backend="aot_eager", fullgraph=True)):
        with context():
            logits = forward(images()) + 2 * forward(3 * images() + 1)
        if logits.requires_grad:
            logits.square().sum().backward()
        results.append(logits.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    for p, q in zip(eager.parameters(), network.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (context is torch.no_grad)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)
    for p, q in zip(eager.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)


def test_compiled_under_autocast():
    """bf16 inside the graph as outside of it: 0.011 to 0.025 apart on six batches, each 0.14 to 0.6 from float64."""
    torch._dynamo.reset()
    networks = make(dtype=torch.float32), make(dtype=torch.float32)
    results = []
    for network, forward in (
        (networks[0], networks[0]),
        (networks[1], torch.compile(networks[1], backend="aot_eager", fullgraph=True)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(images(torch.float32))
        assert logits.dtype == torch.float32  # the classifier's own
        logits.float().square().sum().backward()
        results.append([logits, *(p.grad for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * a.abs().max().item())


def test_compiled_without_gradients():
    torch._dynamo.reset()
    network = make().eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), network(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compiled_for_any_batch():
    """A batch dimension that the graph leaves open."""
    torch._dynamo.reset()
    network = make()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    eager = make()
    for batch in (4, 6, 3):
        logits, expected = compiled(images(batch=batch)), eager(images(batch=batch))
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        logits.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(network.stem.weight.grad, eager.stem.weight.grad, rtol=1e-9, atol=1e-9)


def test_exported():
    network = make().eval()
    exported = torch.export.export(network, (images(),))
    assert "ban_fast.dense_block" in exported.graph_module.print_readable(print_output=False)
    torch.testing.assert_close(exported.module()(images()), network(images()), rtol=1e-10, atol=1e-10)


def test_on_the_meta_device():
    with torch.device("meta"):
        network = make()
        logits = network(torch.empty(4, 3, 8, 8, dtype=torch.float64))
    logits.sum().backward()
    assert logits.shape == (4, 5)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
