"""Dense blocks for the Triton kernels, and their truth: dense_block.py in float64 on the CPU, from the same bits.

(That one is held to the plain network, to 1e-10, in tests/models.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ban_fast.backends import dense_block
from ban_fast.backends.dense_interface import Gradients, Need, Saved
from ban_fast.backends.dense_shape import Norm


class Widths(NamedTuple):
    """What a block depends on beside values."""

    units: int = 2
    entry: int = 16
    """With growth 12 backward makes again what both units' 1x1 convolutions made, with 5 the first's, with 3 none."""
    growth: int = 12
    bottleneck: int = 4
    exit: int = 10
    """Channels after a transition; 0: the mean over the image."""
    batch: int = 2
    height: int = 6
    width: int = 6
    fixed: Sequence[int] = ()
    """Norms that normalise by running statistics."""


class Block(NamedTuple):
    """Its input, weights and norms, and the gradient that comes back."""

    x: Tensor
    convs: list[Tensor]
    norms: list[Norm]
    grad: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Block":
        """Norms stay in what sums are in."""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        norms = [
            Norm(*(None if v is None else v.to(device, acc) for v in norm[:4]), norm.eps)  # type: ignore[arg-type]
            for norm in self.norms
        ]
        convs = [weight.to(device, dtype) for weight in self.convs]
        x = self.x.to(device, dtype, memory_format=torch.channels_last)
        return Block(x, convs, norms, self.grad.to(device, dtype))


class Answer(NamedTuple):
    """Everything that forward and backward give."""

    y: Tensor
    saved: Saved
    gradients: Gradients


def block(widths: Widths, dtype: torch.dtype = torch.float32) -> Block:
    """Values that `dtype` holds exactly."""
    w, generator = widths, torch.Generator().manual_seed(sum(widths[:5]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def norm(channels: int) -> Norm:
        running = (normal(channels), 0.5 + normal(channels).square()) if len(norms) in w.fixed else (None, None)
        return Norm(normal(channels), normal(channels), *running, 1e-5)

    convs: list[Tensor] = []
    norms: list[Norm] = []
    channels, middle = w.entry, w.bottleneck * w.growth
    for _ in range(w.units):
        norms.append(norm(channels))
        norms.append(norm(middle))
        convs += [normal(middle, channels, 1, 1) / channels**0.5, normal(w.growth, middle, 3, 3) / (9 * middle) ** 0.5]
        channels += w.growth
    norms.append(norm(channels))
    if w.exit:
        convs.append(normal(w.exit, channels, 1, 1) / channels**0.5)
    grad = normal(w.batch, w.exit, w.height, w.width) if w.exit else normal(w.batch, channels)
    given = Block(normal(w.batch, w.entry, w.height, w.width), convs, norms, grad)
    return given.to(torch.device("cpu"), dtype)


def everything(given: Block) -> Need:
    return Need(True, [True] * len(given.convs), [True] * len(given.norms))


def answer(implementation: Any, given: Block, need: Need | None = None, group: str = "") -> Answer:
    y, saved = implementation.forward(given.x, given.convs, given.norms, group=group, keep=True)
    need = need or everything(given)
    gradients = implementation.backward(given.grad, saved, given.convs, given.norms, need, group=group)
    return Answer(y, saved, gradients)


def truth(given: Block, need: Need | None = None) -> Answer:
    return answer(dense_block, given.to(torch.device("cpu"), torch.float64), need)


def error(got: Tensor, expected: Tensor) -> float:
    """In the 2-norm, relative to what is expected."""
    return float((got.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def errors(got: Answer, expected: Answer) -> dict[str, float]:
    """Of everything, by name. What is not asked for must be missing in both."""
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "y": (got.y, expected.y),
        "statistics": (got.saved.statistics, expected.saved.statistics),
        "hidden statistics": (got.saved.hidden_statistics, expected.saved.hidden_statistics),
        "total": (got.saved.total, expected.saved.total),
        "gradient of x": (got.gradients.x, expected.gradients.x),
    }
    for kind in ("convs", "norms"):
        both = zip(getattr(got.gradients, kind), getattr(expected.gradients, kind), strict=True)
        pairs |= {f"gradient of {kind}[{i}]": pair for i, pair in enumerate(both)}
    found = {}
    for name, (a, b) in pairs.items():
        assert (a is None) == (b is None), name
        if a is not None and b is not None and b.numel():
            assert a.shape == b.shape, name
            found[name] = error(a, b)
    return found
