"""DenseNet-BC with explicit widths, in three memories: one state_dict, one result, three costs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..ops.pooling import halved
from . import checks, init
from .classifier import Classifier
from .dense_shared import through_block

MEMORIES = ("plain", "checkpoint", "shared")


@contextmanager
def _statistics_kept(norm: nn.BatchNorm2d, training: bool) -> Iterator[None]:
    """Batch norm runs as in mode `training`, and what it does to its running statistics is thrown away."""
    mode, statistics = norm.training, dict(norm.named_buffers(recurse=False))
    norm.training = training
    try:
        if training:
            for name, buffer in statistics.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        norm.training = mode
        for name, buffer in statistics.items():
            setattr(norm, name, buffer)


class NormReluConv(nn.Module):
    """Concatenation, batch norm, ReLU, convolution. With `recompute`, backward makes the first three again.

    Then autograd holds the features themselves, which all units of a block share, instead of two copies of their
    concatenation a unit: linear in depth, not quadratic. `torch.utils.checkpoint` stops before the convolution, which
    is never run twice, and it carries autocast, DDP and torch.compile, whose partitioner knows its marks (the
    recomputation in an autograd.Function would be merged with the forward's, and everything saved).
    """

    def __init__(self, in_width: int, out_width: int, kernel_size: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_width)
        self.conv = nn.Conv2d(in_width, out_width, kernel_size, padding=kernel_size // 2, bias=False)
        self.recompute = recompute

    def forward(self, *features: torch.Tensor) -> torch.Tensor:  # n of [B, C_i, H, W] -> [B, out, H, W]
        if not (self.recompute and torch.is_grad_enabled()):
            return self._run(*features)
        count, training, first = len(features), self.norm.training, True

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            nonlocal first
            with nullcontext() if first else _statistics_kept(self.norm, training):
                if not torch.compiler.is_compiling():  # a compiled graph updates the statistics once by itself
                    first = False
                return self._run(*tensors[:count])

        # What `run` reads is passed along, so that changing it in place before backward is an error, as it is without
        # recomputation; running statistics are read in eval mode alone.
        read = (*self.parameters(), *(() if training else self.norm.buffers()))
        y: torch.Tensor = checkpoint(run, *features, *read, use_reentrant=False, preserve_rng_state=False)
        return y

    def _run(self, *features: torch.Tensor) -> torch.Tensor:
        x = features[0] if len(features) == 1 else torch.cat(features, 1)
        y: torch.Tensor = self.conv(F.relu(self.norm(x), inplace=True))
        return y


class Unit(nn.Module):
    """A dense unit: 1x1 to `bottleneck` channels, then 3x3 to `growth`, each after batch norm and ReLU."""

    def __init__(self, in_width: int, bottleneck: int, growth: int, *, recompute: bool) -> None:
        super().__init__()
        self.reduce = NormReluConv(in_width, bottleneck, 1, recompute=recompute)
        self.grow = NormReluConv(bottleneck, growth, 3)

    def forward(self, *features: torch.Tensor) -> torch.Tensor:  # n of [B, C_i, H, W] -> [B, growth, H, W]
        y: torch.Tensor = self.grow(self.reduce(*features))
        return y


class DenseNet(nn.Module):
    """Dense blocks of units that each read everything before them, with transitions between the blocks.

    [B, in_channels, H, W] -> logits [B, num_classes]; every block after the first halves H and W.

    units: units in each block.
    growth: channels that a unit adds, for each block.
    init_width: channels of the stem, a 3x3 convolution.
    transition_widths: channels after each transition (BN-ReLU-1x1). None: half of what enters, rounded down.
    final_transition: whether one follows the last block too; it does not pool, and BN-ReLU comes after it. The paper's
        DenseNet-90-60, 80-80 and 80-120 have it by their parameter counts.
    bottleneck: channels between a unit's 1x1 and 3x3, in growths.
    memory: "plain" keeps every concatenation for backward; "checkpoint" makes concatenation, batch norm and ReLU
        again there, to the same bits; "shared" never concatenates, stores every feature once, and computes its batch
        statistics once for all that read it: the same to rounding, with the least memory and time. It calls the
        modules' parameters, not the modules: hooks on those within a block do not run, and it has no second
        derivative.
    sync_statistics: batch statistics over the images of all ranks of the default process group, if there is one: once
        a channel, on any device. Only for "shared", which takes nn.SyncBatchNorm too.

    Convolutions start from N(0, 2 / fan_out), as in the authors' code. UserError for arguments that cannot be.
    """

    def __init__(
        self,
        units: Sequence[int],
        growth: Sequence[int],
        init_width: int,
        transition_widths: Sequence[int] | None = None,
        final_transition: bool = False,
        *,
        num_classes: int = 100,
        in_channels: int = 3,
        bottleneck: int = 4,
        memory: str = "plain",
        sync_statistics: bool = False,
    ) -> None:
        super().__init__()
        transitions = len(units) - (not final_transition)
        _check(units, growth, transition_widths, transitions)
        for name, value in (
            ("init_width", init_width),
            ("num_classes", num_classes),
            ("in_channels", in_channels),
            ("bottleneck", bottleneck),
        ):
            checks.whole(name, value)
        self.memory = checks.choice("memory", memory, MEMORIES)
        if sync_statistics and memory != "shared":
            raise UserError(
                f'sync_statistics needs memory="shared", got {memory!r}; nn.SyncBatchNorm serves the others'
            )
        self.sync_statistics = sync_statistics
        recompute = memory == "checkpoint"

        self.stem = nn.Conv2d(in_channels, init_width, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        width = init_width
        for i, (count, k) in enumerate(zip(units, growth, strict=True)):
            self.blocks.append(
                nn.ModuleList(Unit(width + j * k, bottleneck * k, k, recompute=recompute) for j in range(count))
            )
            width += count * k
            if i < transitions:
                narrowed = width // 2 if transition_widths is None else transition_widths[i]
                self.transitions.append(NormReluConv(width, narrowed, 1, recompute=recompute))
                width = narrowed
        self.norm = nn.BatchNorm2d(width)
        self.classifier = Classifier(width, num_classes)
        init.he_(self, "fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        checks.image(x, self.stem.weight, 2 ** (len(self.blocks) - 1))
        if self.memory == "shared":
            return self._shared(x)
        features: tuple[torch.Tensor, ...] = (self.stem(x),)
        for i, block in enumerate(self.blocks):
            if i:
                features = (F.avg_pool2d(features[0], 2),)
            for unit in block.children():
                features = (*features, unit(*features))
                if self.memory == "plain":
                    features = (torch.cat(features, 1),)
            if i < len(self.transitions):
                features = (self.transitions[i](*features),)
        x = features[0] if len(features) == 1 else torch.cat(features, 1)
        x = F.relu(self.norm(x), inplace=True)
        logits: torch.Tensor = self.classifier(x.mean((2, 3)))
        return logits

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` with a block and the transition after it, or the end of the network, as one operator."""
        x = self.stem(x.to(memory_format=torch.channels_last))
        transitions = cast(list[NormReluConv], list(self.transitions.children()))
        for i, block in enumerate(self.blocks.children()):
            parts = [part for unit in cast(Iterable[Unit], block.children()) for part in (unit.reduce, unit.grow)]
            parts += transitions[i : i + 1]
            norms: list[nn.Module] = [part.norm for part in parts]
            if i == len(transitions):
                norms.append(self.norm)
            x = through_block(halved(x) if i else x, norms, [part.conv for part in parts], self.sync_statistics)
        if len(transitions) == len(self.blocks):
            x = through_block(x, [self.norm], [], self.sync_statistics)
        logits: torch.Tensor = self.classifier(x)
        return logits


def _check(units: Sequence[int], growth: Sequence[int], widths: Sequence[int] | None, transitions: int) -> None:
    if not units or len(growth) != len(units):
        raise UserError(f"units and growth must name the same blocks, got {list(units)} and {list(growth)}")
    if widths is not None and len(widths) != transitions:
        raise UserError(f"{len(units)} blocks have {transitions} transitions here, got widths {list(widths)}")
    for name, values in (("units", units), ("growth", growth), ("transition_widths", widths or ())):
        for value in values:
            checks.whole(name, value)


def densenet_bc(
    units: int,
    growth: int,
    final_transition: bool = False,
    *,
    num_classes: int = 100,
    in_channels: int = 3,
    memory: str = "plain",
    sync_statistics: bool = False,
) -> DenseNet:
    """DenseNet-BC of three blocks of `units` units: stem of two growths, transitions that halve the width."""
    return DenseNet(
        [units] * 3,
        [growth] * 3,
        2 * growth,
        final_transition=final_transition,
        num_classes=num_classes,
        in_channels=in_channels,
        memory=memory,
        sync_statistics=sync_statistics,
    )
