"""Small networks in fp64 in every memory, and what of them must agree: to 1e-10 of the largest value."""

from collections.abc import Callable

import torch
from torch import nn

from ban_fast import models

UNITS, GROWTH = [3, 2, 2], [4, 5, 33]  # 33 is the paper's odd growth
# So that backward makes again what some units' 1x1 convolutions made, and finds kept what others' did: none, one, both.
INIT_WIDTH = 20
# Both forms round each sum to 1e-16 of its terms; a few hundred steps of such sums stay four digits below this.
CLOSE = 1e-10


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def frozen_norms(network: nn.Module) -> None:
    """Some normalise by their running statistics in the midst of training."""
    for norm in norms(network)[::2]:
        norm.eval()
        norm.requires_grad_(False)


def make(memory: str, units=UNITS, growth=GROWTH, final_transition: bool = True, **arguments) -> nn.Module:
    """A network in fp64, the same for every memory, away from the initial scales, biases and statistics."""
    torch.manual_seed(0)
    network = models.DenseNet(
        units, growth, INIT_WIDTH, final_transition=final_transition, num_classes=5, memory=memory, **arguments
    )
    for norm in norms(network):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)  # of both signs
        nn.init.normal_(norm.bias)
    return network.double()


def images(seed: int = 1, batch: int = 4, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def step(network: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    logits = network(images() if x is None else x)
    logits.square().sum().backward()
    return logits.detach()


def assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, name: str = "", close: float = CLOSE) -> None:
    """Within `close` of the largest element: single elements are differences of sums as large as that."""
    assert (got is None) == (expected is None), name
    if got is not None and expected is not None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=close * max(scale, 1e-30), msg=lambda m: f"{name}: {m}")


def assert_same(
    run: Callable[[nn.Module], torch.Tensor] = step, change: Callable[[nn.Module], object] = bool, **arguments
) -> tuple[nn.Module, nn.Module]:
    """What `run` returns, every gradient and every running statistic agree."""
    plain, shared = make("plain", **arguments), make("shared", **arguments)
    change(plain)
    change(shared)
    assert_close(run(shared), run(plain), "result")
    for (name, p), q in zip(plain.named_parameters(), shared.parameters(), strict=True):
        assert_close(q, p, name)
        assert_close(q.grad, p.grad, f"gradient of {name}")
    for (name, b), c in zip(plain.named_buffers(), shared.buffers(), strict=True):
        assert_close(c, b, name)
    return plain, shared


def train(network: nn.Module, steps: int = 4, batch: int = 4, size: int = 8) -> torch.Tensor:
    """The last step's logits and gradient of the images, of which each is divided by its largest value."""
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for i in range(steps):
        optimizer.zero_grad()
        x = images(i, batch, size).requires_grad_()
        logits = network(x)
        nn.functional.cross_entropy(logits, torch.arange(batch) % 5).backward()
        optimizer.step()
    assert x.grad is not None
    return torch.cat([value.detach().flatten() / value.detach().abs().max() for value in (logits, x.grad)])
