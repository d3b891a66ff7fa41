"""What the implementations of a dense block give and take beside tensors."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Saved(NamedTuple):
    """What backward needs beside forward's arguments: 5 growths a pixel and unit at most, and vectors."""

    features: Tensor
    """[B, H, W, C]: the block's input, then what every unit grew."""
    hidden: list[Tensor]
    """[B, H, W, 4k] of every unit after the first `Shape.remade`: what its 1x1 convolution made. Empty where forward
    was not to keep them."""
    statistics: Tensor
    """[2, C] acc: batch mean and biased variance of the features; zeros where no norm asks for them."""
    hidden_statistics: Tensor
    """[n, 2, 4k] acc, likewise."""
    total: Tensor
    """[] acc: over how many values these are, all ranks' together."""


class Need(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    convs: Sequence[bool]
    norms: Sequence[bool]

    def first_unit(self, units: int) -> int:
        """The first unit that backward must come down to; `units` where the exit is all."""
        if self.x:
            return 0
        wanted = [unit for unit in range(units) if any((*self.convs[2 * unit :][:2], *self.norms[2 * unit :][:2]))]
        return min(wanted, default=units)


class Gradients(NamedTuple):
    """Gradients of forward's tensors; None where none was asked for."""

    x: Tensor | None
    convs: list[Tensor | None]
    norms: list[Tensor | None]
    """[2, C] acc: of weight and bias."""
