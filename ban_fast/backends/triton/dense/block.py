"""A dense block in Triton kernels: the steps of backends/dense_block.py, whose explanation of the gradient holds here.

A unit takes in forward six launches: its 1x1 convolution from the features, whose moments one finishes; relu(norm) of
that for cuDNN's 3x3 convolution; its place among the features, with moments; and one that finishes these together with
the scale and shift by which the next 1x1 convolution reads. In backward, beside cuDNN's, nine: the gradient of what
the unit grew, corrected once; relu(norm) again; the sums of the second norm, in two, and the gradient before it; that
of the weight, in two; that of the features with the sums of the first norm, and what settles them. The first units
(`Shape.remade`) take two more, which make again what their 1x1 convolutions made. A weight whose rows 8 bytes do not
divide is packed in two more, each way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ban_fast.backends.dense_convolution import channels_last, convolve, convolve_backward, images_first, rows
from ban_fast.backends.dense_interface import Gradients, Need, Saved
from ban_fast.backends.dense_shape import Norm, Shape
from ban_fast.backends.dense_statistics import sum_over_ranks
from ban_fast.backends.triton.dense import passes
from ban_fast.backends.triton.dense.products import project, unproject, weight_gradient
from ban_fast.backends.triton.dense.statistics import Partials, finish, settle
from ban_fast.backends.triton.launch import on


def forward(
    x: Tensor,  # [B, C0, H, W]
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    *,
    group: str,
    keep: bool,
) -> tuple[Tensor, Saved]:
    """As `dense_block.forward`."""
    with on(x.device):
        work = _Forward(Shape.of(x, convs, norms), convs, norms, group)
        work.enter(x)
        hidden: list[Tensor] = []
        for unit in range(work.shape.units):
            between = work.unit(unit)
            if keep and unit >= work.shape.remade:  # all of them at once are four times the features
                hidden.append(between)
            del between
        y = work.leave()
    saved = Saved(work.features, hidden, work.statistics, work.hidden_statistics, work.total)
    return y, saved


def backward(
    grad: Tensor,  # as forward's result
    saved: Saved,
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    need: Need,
    *,
    group: str,
) -> Gradients:
    """As `dense_block.backward`."""
    with on(grad.device):
        work = _Backward(saved, convs, norms, need, group)
        units = work.shape.units
        work.leave(grad)
        for unit in reversed(range(need.first_unit(units), units)):
            work.unit(unit)
        return Gradients(work.entry() if need.x else None, work.conv_grads, work.norm_grads)


class _Forward:
    """The features so far, their statistics, and by what scale and shift they are read next."""

    def __init__(self, shape: Shape, convs: Sequence[Tensor], norms: Sequence[Norm], group: str) -> None:
        self.shape, self.convs, self.norms, self.group = shape, convs, norms, group
        self.features = shape.features()
        self.statistics = shape.vectors(2, shape.channels)
        self.hidden_statistics = shape.vectors(shape.units, 2, shape.bottleneck)
        self.batch = any(norm.mean is None for norm in norms[::2])
        measured = any(norm.mean is None for norm in norms)
        pixels = shape.batch * shape.height * shape.width
        self.total = torch.full((), pixels if measured else 1, dtype=self.statistics.dtype, device=shape.device)
        self.affine: Tensor | None = None

    def enter(self, x: Tensor) -> None:
        self._grow(channels_last(x), slice(0, self.shape.entry), self.norms[0])

    def unit(self, unit: int) -> Tensor:
        """What the unit's 1x1 convolution made, [B, H, W, 4k]."""
        shape, norm = self.shape, self.norms[2 * unit + 1]
        between, statistics = shape.maps(shape.bottleneck), self.hidden_statistics[unit]
        source = rows(self.features[..., : shape.read_by(unit)])
        assert self.affine is not None
        partials = project(source, self.affine, self.convs[2 * unit], rows(between), measured=norm.mean is None)
        self._finish(partials, statistics, None)
        a = passes.activate(rows(between), norm, statistics).view(between.shape)
        self._grow(convolve(a, self.convs[2 * unit + 1]), shape.grown_by(unit), self.norms[2 * unit + 2])
        return between

    def leave(self) -> Tensor:
        shape, source = self.shape, rows(self.features)
        if len(self.convs) == 2 * shape.units:
            return passes.average(source, self.norms[-1], self.statistics, shape.batch)
        y = shape.maps(self.convs[-1].shape[0])
        assert self.affine is not None
        project(source, self.affine, self.convs[-1], rows(y), measured=False)
        return images_first(y)

    def _grow(self, x: Tensor, channels: slice, reader: Norm) -> None:  # [B, H, W, C], contiguous
        """x becomes those channels of the features; `reader` normalises these and all before them."""
        partials = passes.place(rows(x), rows(self.features[..., channels]), measured=self.batch)
        self.affine = self._finish(partials, self.statistics[:, : channels.stop], reader)

    def _finish(self, partials: Partials | None, statistics: Tensor, reader: Norm | None) -> Tensor | None:
        affine, total = finish(partials, statistics, reader, self.group)
        self.total = self.total if total is None else total
        return affine


class _Backward:
    """The block's gradient buffer, and what the producers of its channels have yet to take off."""

    def __init__(self, saved: Saved, convs: Sequence[Tensor], norms: Sequence[Norm], need: Need, group: str) -> None:
        self.saved, self.convs, self.norms, self.need, self.group = saved, convs, norms, need, group
        entry = norms[0].weight.shape[0]
        self.shape = Shape.of(images_first(saved.features[..., :entry]), convs, norms)
        self.grad = self.shape.features(saved.statistics.dtype)
        self.terms = torch.empty_like(saved.statistics)
        self.conv_grads: list[Tensor | None] = [None] * len(convs)
        self.norm_grads: list[Tensor | None] = [None] * len(norms)

    def leave(self, grad: Tensor) -> None:  # as forward's result
        """Through the exit. It reads every channel and comes first, so neither buffer nor terms need zeros."""
        index, channels = 2 * self.shape.units, self.shape.channels
        if grad.dim() == 4:
            self._through(index, rows(channels_last(grad)), channels, add=False)
            return
        source, statistics, norm = rows(self.saved.features), self.saved.statistics, self.norms[index]
        partials = passes.deposit(grad.contiguous(), source, norm, statistics, rows(self.grad))
        self._settle(index, partials, statistics, self.terms, add=False)

    def unit(self, unit: int) -> None:
        """Through a unit's two convolutions, from the channels that it grew to those that it read."""
        index, hidden, statistics = 2 * unit + 1, self.hidden(unit), self.saved.hidden_statistics[unit]
        norm, weight, wanted = self.norms[index], self.convs[index], self.need.convs[index]
        a = passes.activate(rows(hidden), norm, statistics).view(hidden.shape)
        grad, weight_grad = convolve_backward(self._made(self.shape.grown_by(unit)), a, weight, wanted)
        if weight_grad is not None and weight_grad.stride() != weight.stride():
            weight_grad = torch.empty_like(weight).copy_(weight_grad)  # laid out as compiled graphs are told
        self.conv_grads[index] = weight_grad
        terms = torch.empty_like(statistics)
        self._settle(index, passes.deposit(rows(grad), rows(hidden), norm, statistics), statistics, terms, add=False)
        taken = sum_over_ranks(terms, self.group)
        passes.correct(rows(grad), rows(hidden), statistics, taken, self.saved.total, rows(grad), norm)
        self._through(2 * unit, rows(grad), self.shape.read_by(unit), add=True)

    def hidden(self, unit: int) -> Tensor:  # [B, H, W, 4k]
        """What the unit's 1x1 convolution made: kept, or made again by the same kernel from the same numbers."""
        shape, saved, width = self.shape, self.saved, self.shape.read_by(unit)
        if unit >= shape.remade:
            return saved.hidden[unit - shape.remade]
        between = shape.maps(shape.bottleneck)
        affine, _ = finish(None, saved.statistics[:, :width], self.norms[2 * unit], "")
        assert affine is not None
        project(rows(saved.features[..., :width]), affine, self.convs[2 * unit], rows(between), measured=False)
        return between

    def entry(self) -> Tensor:  # [B, C0, H, W]
        """The gradient of the block's input."""
        return images_first(self._made(slice(0, self.shape.entry)))

    def _through(self, index: int, grad: Tensor, channels: int, *, add: bool) -> None:  # [R, out]
        """Through the 1x1 convolution of that number, ReLU and norm to the first `channels` of the features."""
        source, statistics = rows(self.saved.features[..., :channels]), self.saved.statistics[:, :channels]
        norm, weight = self.norms[index], self.convs[index]
        if self.need.convs[index]:
            self.conv_grads[index] = weight_gradient(grad, source, norm, statistics, weight)
        into = rows(self.grad[..., :channels])
        partials = unproject(grad, weight, source, norm, statistics, into, add=add)
        self._settle(index, partials, statistics, self.terms[:, :channels], add=add)

    def _settle(self, index: int, partials: Partials, statistics: Tensor, terms: Tensor, *, add: bool) -> None:
        found = settle(partials, self.norms[index], statistics, terms, add=add)
        if self.need.norms[index]:
            self.norm_grads[index] = found

    def _made(self, channels: slice) -> Tensor:  # [B, H, W, C], contiguous
        """The gradient of some channels, all of whose consumers have been gone through."""
        saved, out = self.saved, self.shape.maps(channels.stop - channels.start)
        terms, source = sum_over_ranks(self.terms[:, channels], self.group), rows(saved.features[..., channels])
        grad = rows(self.grad[..., channels])
        passes.correct(grad, source, saved.statistics[:, channels], terms, saved.total, rows(out))
        return out
