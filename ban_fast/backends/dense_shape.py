"""What a dense block's passes and convolutions run over: its norms, its widths, its images in chunks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ban_fast.backends.interface import acc_dtype

CHUNK_ELEMENTS = 1 << 20
"""Activations that a CPU makes at a time, for each of torch's threads: 4 MiB of fp32. oneDNN's 1x1 convolutions ran at
240 GFLOP/s a core (Zen 5) on 4096 pixels of 216 channels, at 220 on half, at 100 to 170 on a batch whose activations
leave the cache. The fewer chunks, the fewer times threads wait for one another. How sums over them are rounded depends
on the number of threads, as it does in oneDNN's gradients of weights, within a chunk."""


class Norm(NamedTuple):
    """One batch norm over C channels; vectors are acc."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    """Running statistics where it normalises by those; None where by the batch's."""
    var: Tensor | None
    eps: float

    def to(self, dtype: torch.dtype) -> "Norm":
        """With vectors of that dtype."""
        mean, var = (None if value is None else value.to(dtype) for value in (self.mean, self.var))
        return Norm(self.weight.to(dtype), self.bias.to(dtype), mean, var, self.eps)


class Affine(NamedTuple):
    """A norm with its statistics put in: z = x * scale + shift. All are [C]."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    inverse_std: Tensor

    @classmethod
    def of(cls, norm: Norm, statistics: Tensor) -> "Affine":  # [2, C]
        """`statistics` are the batch's: mean and biased variance."""
        mean, var = (statistics[0], statistics[1]) if norm.mean is None else (norm.mean, norm.var)
        assert var is not None
        inverse_std = torch.rsqrt(var + norm.eps)
        scale = norm.weight * inverse_std
        return cls(scale, torch.addcmul(norm.bias, mean, scale, value=-1), mean, inverse_std)


@dataclass(frozen=True)
class Shape:
    """A block's widths and its images, cut into chunks whose activations fit the cache."""

    batch: int
    height: int
    width: int
    entry: int
    """Channels of the block's input."""
    units: int
    bottleneck: int
    """Channels between a unit's convolutions; 0 where there are no units."""
    growth: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, convs: Sequence[Tensor], norms: Sequence[Norm]) -> "Shape":
        """Of a block's input [B, C0, H, W], its convolutions' weights and its norms."""
        batch, entry, height, width = x.shape
        units = len(norms) // 2
        bottleneck, growth = (convs[0].shape[0], convs[1].shape[0]) if units else (0, 0)
        return cls(batch, height, width, entry, units, bottleneck, growth, x.dtype, x.device)

    @property
    def channels(self) -> int:
        """What the exit reads: everything."""
        return self.read_by(self.units)

    def read_by(self, unit: int) -> int:
        """How many channels unit number `unit` reads, always the first ones."""
        return self.entry + unit * self.growth

    def grown_by(self, unit: int) -> slice:
        """The channels that it makes."""
        return slice(self.read_by(unit), self.read_by(unit + 1))

    @property
    def remade(self) -> int:
        """How many units, the first ones, have what their 1x1 convolution made computed again in backward, not kept.

        Those that read no more channels than it makes: at the beginning of a network, where maps are largest and these
        convolutions cheapest. In a DenseNet-BC-80-80 they are 15 % of all that is kept, and 1 % of a step's arithmetic.
        """
        return sum(self.read_by(unit) <= self.bottleneck for unit in range(self.units))

    def chunks(self, channels: int) -> list[slice]:
        """The images, so many at a time that activations of so many channels fit the cache; on a GPU all at once."""
        count = 1 if self.batch else 0
        if self.device.type == "cpu":  # two images at least: torch gives oneDNN no small one alone
            image = self.height * self.width * channels
            at_once = CHUNK_ELEMENTS * torch.get_num_threads()
            count = min(-(-self.batch * image // at_once), -(-self.batch // 2))
        bounds = [self.batch * i // count for i in range(count + 1)] if count else []
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def at_once(self) -> list[slice]:
        """All images, if there are any."""
        return [slice(0, self.batch)] if self.batch else []

    def rows(self, chunks: Sequence[slice]) -> list[int]:
        """Pixels of every chunk."""
        return [(images.stop - images.start) * self.height * self.width for images in chunks]

    @cached_property
    def room(self) -> Tensor:
        """Where the activations of one chunk are made, again and again, so that it stays in the cache."""
        widths = {self.bottleneck, *(self.read_by(unit) for unit in range(self.units + 1))}
        return self.new(max(width * max(self.rows(self.chunks(width)), default=0) for width in widths))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor in the features' dtype."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def vectors(self, *shape: int) -> Tensor:
        """Zeros in acc."""
        return torch.zeros(shape, dtype=acc_dtype(self.dtype), device=self.device)

    def parts(self, chunks: Sequence[slice], channels: int) -> Tensor:
        """[chunks, 2, channels] acc, uninitialised: moments of every chunk."""
        return self.new(len(chunks), 2, channels, dtype=acc_dtype(self.dtype))

    def features(self, dtype: torch.dtype | None = None) -> Tensor:
        """[B, H, W, channels], uninitialised. Its pitch, the same in every dtype, is one that 16 bytes divide: a GPU's
        thread loads so many at a time."""
        step = 16 // self.dtype.itemsize
        return self.maps(-(-self.channels // step) * step, dtype)[..., : self.channels]

    def maps(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, H, W, channels], uninitialised."""
        return self.new(self.batch, self.height, self.width, channels, dtype=dtype)
