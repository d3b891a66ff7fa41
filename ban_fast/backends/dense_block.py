"""A dense block whose features exist once: forward and backward over one channels-last buffer.

Every consumer of a channel normalises it with the same batch statistics, so they are computed once, where the channel
is produced. With z = scale * (x - mean) + bias, scale = weight / std, the gradient of x over its consumers l is

    sum_l scale_l dz_l  -  sum_l scale_l mean(dz_l)  -  (x - mean) sum_l scale_l / var_l mean(dz_l (x - mean))

Backward goes through the consumers in reverse. Each adds scale_l dz_l to the block's gradient buffer, and its two sums,
from which its weight and bias have their gradients, to those of the second and third term; the producer takes these
two off, once. Normalised activations are never kept: they are made on their way into a 1x1 convolution where native
code multiplies (`dense_passes.multiplies`), else for a few images at a time, few enough for the cache; and again in
backward. So is what the 1x1 convolutions of the first units made (`Shape.remade`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ban_fast.backends import dense_passes as passes
from ban_fast.backends.dense_convolution import channels_last, convolve, convolve_backward, images_first, rows
from ban_fast.backends.dense_interface import Gradients, Need, Saved
from ban_fast.backends.dense_shape import Affine, Norm, Shape
from ban_fast.backends.dense_statistics import finish, sum_over_ranks


def forward(
    x: Tensor,  # [B, C0, H, W]
    convs: Sequence[Tensor],  # [4k, C, 1, 1], [k, 4k, 3, 3] of every unit; then the exit's [out, C, 1, 1] if it has one
    norms: Sequence[Norm],  # two of every unit, then the exit's
    *,
    group: str,
    keep: bool,
) -> tuple[Tensor, Saved]:
    """The units, then the exit: relu(norm(features)), convolved to [B, out, H, W], or averaged to [B, C].

    `group` names the process group whose ranks share batch statistics; "" is none.
    """
    shape = Shape.of(x, convs, norms)
    features, total = shape.features(), shape.vectors() + 1
    hidden: list[Tensor] = []
    statistics, hidden_statistics = shape.vectors(2, shape.channels), shape.vectors(shape.units, 2, shape.bottleneck)
    batch = any(norm.mean is None for norm in norms[::2])

    entry = features[..., : shape.entry]
    entry.copy_(x.permute(0, 2, 3, 1))
    if batch:
        chunks = shape.chunks(shape.entry)
        moments = shape.parts(chunks, shape.entry)
        for images, part in zip(chunks, moments, strict=True):
            passes.moments(rows(entry[images]), part)
        total = finish(moments, shape.rows(chunks), group, statistics[:, : shape.entry])
    for unit in range(shape.units):
        width, grown = shape.read_by(unit), shape.grown_by(unit)
        reduce, grow = norms[2 * unit : 2 * unit + 2]
        affine = Affine.of(reduce, statistics[:, :width])
        between, parts = _convolve(shape, features[..., :width], affine, convs[2 * unit], grow.mean is None)
        if parts is not None:
            total = finish(*parts, group, hidden_statistics[unit])
        affine = Affine.of(grow, hidden_statistics[unit])
        _, parts = _convolve(shape, between, affine, convs[2 * unit + 1], batch, features[..., grown])
        if parts is not None:
            total = finish(*parts, group, statistics[:, grown])
        if keep and unit >= shape.remade:
            hidden.append(between)
    y = _leave(shape, features, Affine.of(norms[-1], statistics), convs[2 * shape.units :])
    return y, Saved(features, hidden, statistics, hidden_statistics, total)


def _convolve(
    shape: Shape,
    source: Tensor,  # [B, H, W, C], any pitch
    affine: Affine,
    weight: Tensor,  # [out, C, 1, 1] or [out, C, 3, 3]
    measured: bool,
    into: Tensor | None = None,  # [B, H, W, out], any pitch
) -> tuple[Tensor, tuple[Tensor, list[int]] | None]:
    """The convolution of relu(affine(source)), in `into` or in memory of its own.

    And, if `measured`, moments of what it made in every chunk, [chunks, 2, out], and of how many pixels they are.
    """
    out, product = weight.shape[0], _is_product(source, weight)
    chunks = shape.at_once() if product else shape.chunks(source.shape[-1])
    parts = shape.parts(chunks, out)
    for images, part in zip(chunks, parts, strict=True):
        if product:
            into = shape.maps(out) if into is None else into
            y = into[images]
            passes.pointwise(rows(source[images]), affine.scale, affine.shift, _flat(weight), rows(y))
        else:
            y = convolve(_activation(shape, source[images], affine), weight)
            if into is None and len(chunks) == 1:
                into = y
            else:
                into = shape.maps(out) if into is None else into
                into[images] = y
        if measured:
            passes.moments(rows(y), part)
    into = shape.maps(out) if into is None else into  # of no image
    return into, (parts, shape.rows(chunks)) if measured else None


def _is_product(source: Tensor, weight: Tensor) -> bool:
    """Whether batch norm, ReLU and this convolution are one pass. A weight that does not fit is conv2d's to refuse."""
    channels = source.shape[-1]
    is_flat = weight.shape[1:] == (channels, 1, 1) and weight.stride()[:2] == (channels, 1)
    alike = (weight.dtype, weight.device) == (source.dtype, source.device)
    return is_flat and alike and passes.multiplies(source, weight.numel())


def _flat(weight: Tensor) -> Tensor:  # [out, C, 1, 1] -> [out, C]
    """A view."""
    return weight.view(weight.shape[:2])


def _activation(shape: Shape, x: Tensor, affine: Affine) -> Tensor:  # [b, H, W, C]
    out = shape.room[: x.numel()].view(x.shape)
    passes.activate(rows(x), affine.scale, affine.shift, rows(out))
    return out


def _leave(shape: Shape, features: Tensor, affine: Affine, convs: Sequence[Tensor]) -> Tensor:
    if convs:
        return images_first(_convolve(shape, features, affine, convs[0], False)[0])
    y = shape.new(shape.batch, shape.channels)
    for images in shape.chunks(shape.channels):
        y[images] = _activation(shape, features[images], affine).mean((1, 2))
    return y


def backward(
    grad: Tensor,  # as forward's result
    saved: Saved,
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    need: Need,
    *,
    group: str,
) -> Gradients:
    """The gradients that `need` asks for. No argument is changed."""
    work = _Backward(saved, convs, norms, need, group)
    units = work.shape.units
    work.leave(grad)
    for unit in reversed(range(need.first_unit(units), units)):
        work.unit(unit)
    return Gradients(work.entry() if need.x else None, work.conv_grads, work.norm_grads)


Upstream = Callable[[slice], Tensor]
"""From some images to the gradient of what was made of them, [b, H, W, C] in the features' dtype, contiguous: until the
next call."""


class _Backward:
    """The block's gradient buffer, and what the producers of its channels have yet to take off."""

    def __init__(self, saved: Saved, convs: Sequence[Tensor], norms: Sequence[Norm], need: Need, group: str) -> None:
        self.saved, self.convs, self.norms, self.need, self.group = saved, convs, norms, need, group
        entry = norms[0].weight.shape[0]
        self.shape = Shape.of(images_first(saved.features[..., :entry]), convs, norms)
        self.grad = self.shape.features(saved.statistics.dtype)
        # Of one unit at a time: memory that is asked for anew is paid for page by page.
        self.hidden_grad = self.shape.maps(self.shape.bottleneck, self.grad.dtype)
        self.room = self.shape.new(0)
        self.terms = self.shape.vectors(2, self.shape.channels)
        self.conv_grads: list[Tensor | None] = [None] * len(convs)
        self.norm_grads: list[Tensor | None] = [None] * len(norms)

    def leave(self, grad: Tensor) -> None:  # as forward's result
        """Through the exit. It reads every channel and comes first, so the buffer needs no zeros."""
        shape, saved = self.shape, self.saved

        def upstream(images: slice) -> Tensor:
            if grad.dim() == 4:
                return channels_last(grad[images])
            mean = grad[images] / (shape.height * shape.width)
            return mean[:, None, None].expand(-1, shape.height, shape.width, -1).contiguous()

        self.consume(2 * shape.units, upstream, saved.features, saved.statistics, self.grad, self.terms, add=False)

    def unit(self, unit: int) -> None:
        """Through a unit's two convolutions, from the channels that it grew to those that it read."""
        shape, saved, width = self.shape, self.saved, self.shape.read_by(unit)
        hidden, statistics = self.hidden(unit), saved.hidden_statistics[unit]
        grad, terms = self.hidden_grad, torch.zeros_like(statistics)
        self.consume(2 * unit + 1, self.made(shape.grown_by(unit)), hidden, statistics, grad, terms, add=False)
        upstream = self.corrected(grad, hidden, statistics, terms)
        features, statistics = saved.features[..., :width], saved.statistics[:, :width]
        grad, terms = self.grad[..., :width], self.terms[:, :width]
        self.consume(2 * unit, upstream, features, statistics, grad, terms, add=True)

    def hidden(self, unit: int) -> Tensor:  # [B, H, W, 4k]
        """What the unit's 1x1 convolution made: kept, or made again."""
        shape, saved, width = self.shape, self.saved, self.shape.read_by(unit)
        if unit >= shape.remade:
            return saved.hidden[unit - shape.remade]
        affine = Affine.of(self.norms[2 * unit], saved.statistics[:, :width])
        return _convolve(shape, saved.features[..., :width], affine, self.convs[2 * unit], False)[0]

    def entry(self) -> Tensor:  # [B, C0, H, W]
        """The gradient of the block's input."""
        shape = self.shape
        out, upstream = shape.maps(shape.entry), self.made(slice(0, shape.entry))
        for images in shape.chunks(shape.entry):
            out[images] = upstream(images)
        return images_first(out)

    def made(self, channels: slice) -> Upstream:
        """The gradient of some channels, all of whose consumers have been gone through."""
        saved, terms = self.saved, self.terms[:, channels]
        return self.corrected(
            self.grad[..., channels], saved.features[..., channels], saved.statistics[:, channels], terms
        )

    def corrected(self, grad: Tensor, x: Tensor, statistics: Tensor, terms: Tensor) -> Upstream:
        p, q = sum_over_ranks(terms, self.group) / self.saved.total

        def upstream(images: slice) -> Tensor:
            wanted = x[images].shape
            if self.room.numel() < wanted.numel():
                self.room = self.shape.new(wanted.numel())
            out = self.room[: wanted.numel()].view(wanted)
            passes.correct(rows(grad[images]), rows(x[images]), statistics[0], p, q, rows(out))
            return out

        return upstream

    def consume(
        self,
        index: int,
        upstream: Upstream,
        source: Tensor,  # [B, H, W, C], any pitch
        statistics: Tensor,  # [2, C]
        into: Tensor,  # [B, H, W, C] acc, any pitch
        terms: Tensor,  # [2, C]
        *,
        add: bool,
    ) -> None:
        """Through the convolution number `index`, if there is one, ReLU, and the norm of that number, to `source`."""
        norm, weight = self.norms[index], self.convs[index] if index < len(self.convs) else None
        affine, sums = Affine.of(norm, statistics), torch.zeros_like(terms)
        weight_grad = None
        if weight is not None and self.need.convs[index]:
            weight_grad = torch.zeros_like(weight, dtype=terms.dtype)
        if weight is not None and _is_product(source, weight):
            flat, part = _flat(weight), None if weight_grad is None else _flat(weight_grad)
            for images in self.shape.at_once():
                grad, x, to = rows(upstream(images)), rows(source[images]), rows(into[images])
                vectors = affine.scale, affine.shift, affine.mean, flat
                passes.pointwise_backward(grad, x, *vectors, to, sums, part, add=add)
        else:
            for images in self.shape.chunks(source.shape[-1]):
                a, grad = _activation(self.shape, source[images], affine), upstream(images)
                if weight is not None:
                    grad, part = convolve_backward(grad, a, weight, weight_grad is not None)
                    if weight_grad is not None and part is not None:
                        weight_grad += part
                x, to = rows(source[images]), rows(into[images])
                passes.deposit(rows(grad), rows(a), x, affine.scale, affine.mean, to, sums, add=add)
        if weight_grad is not None:
            self.conv_grads[index] = weight_grad.to(self.convs[index].dtype)
        if self.need.norms[index]:
            self.norm_grads[index] = torch.stack((sums[1] * affine.inverse_std, sums[0]))
        if norm.mean is None:
            terms += sums * torch.stack((affine.scale, affine.scale * affine.inverse_std.square()))
