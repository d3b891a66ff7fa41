"""Moments of channels and sums of gradients: of a tile by whichever kernel has it, then of all tiles in a small one."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends import dense_statistics
from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton.dense import config
from ban_fast.backends.triton.dense.channels import by, ceil_div, inverse_std, scale_and_shift

_CHANNELS = 8
"""Channels that a program finishes: few, so that there are many programs; 32 bytes of each tile are one sector."""
_TILES = 1024
"""Tiles that it adds at a time, 32 a thread: all of 128 images', so that it waits for memory once."""
_OPTIONS = config.PASS_OPTIONS | {"num_warps": 8}


class Partials(NamedTuple):
    """Two numbers a channel of every tile of rows: mean and sum of squared distances from it, or two sums."""

    values: Tensor
    """[tiles, 2, C] fp32."""
    tile_rows: int
    """Rows of every tile but the last."""
    rows: int
    """Of all tiles."""

    @classmethod
    def of(cls, tiles: int, tile_rows: int, rows: int, x: Tensor) -> "Partials":  # [R, C]
        """For the channels of x; uninitialised."""
        return cls(torch.empty(tiles, 2, x.shape[1], dtype=torch.float32, device=x.device), tile_rows, rows)


@triton.jit
def store_moments(partials, values, tile, rows, cols, num_rows, num_channels, ROWS: tl.constexpr):
    """Those of a tile [ROWS, COLS], from its mean: nothing cancels."""
    inside = (rows < num_rows)[:, None]
    count = tl.minimum(num_rows - tile * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(tl.where(inside, values, 0.0), axis=0) / count
    distance = tl.where(inside, values - mean[None, :], 0.0)
    place = partials + tile.to(tl.int64) * 2 * num_channels + cols
    tl.store(place, mean, mask=cols < num_channels)
    tl.store(place + num_channels, tl.sum(distance * distance, axis=0), mask=cols < num_channels)


@triton.jit
def load_tiles(partials, start, num_tiles, which, cols, inside, num_channels, TILES: tl.constexpr):
    """[TILES, COLS] of one of the two numbers; 0 outside."""
    tiles = start + tl.arange(0, TILES)
    place = partials + (tiles.to(tl.int64)[:, None] * 2 + which) * num_channels + cols[None, :]
    return tl.load(place, mask=(tiles < num_tiles)[:, None] & inside[None, :], other=0.0)


@triton.jit(**config.JIT)
def finish_kernel(
    partials,  # [tiles, 2, measured] or None
    batch_mean,  # [first + measured]: that of the partials goes to the last ones
    batch_var,
    gamma,  # [first + measured], as the following: the norm that reads all these channels, or None
    beta,
    mean,
    var,
    scale,
    shift,
    num_tiles,
    tile_rows,
    num_rows,
    first,
    measured,
    eps,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mean and biased variance from those of tiles (Chan, Golub and LeVeque), then scale and shift of the next norm:
    by the batch, or by the statistics of its own."""
    cols = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < first + measured
    if partials is not None:
        new = inside & (cols >= first)
        num_tiles = tl.where(tl.program_id(0) * CHANNELS + CHANNELS > first, num_tiles, 0)
        middle = tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, num_tiles, TILES):
            count = tl.minimum(num_rows - (start + tl.arange(0, TILES)) * tile_rows, tile_rows).to(tl.float32)
            means = load_tiles(partials, start, num_tiles, 0, cols - first, new, measured, TILES)
            middle += tl.sum(means * (count / num_rows)[:, None], axis=0)
        distances = tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, num_tiles, TILES):
            tiles = start + tl.arange(0, TILES)
            count = tl.minimum(num_rows - tiles * tile_rows, tile_rows).to(tl.float32)
            step = load_tiles(partials, start, num_tiles, 0, cols - first, new, measured, TILES) - middle[None, :]
            own = load_tiles(partials, start, num_tiles, 1, cols - first, new, measured, TILES)
            between = tl.where((tiles < num_tiles)[:, None], step * step * count[:, None], 0.0)
            distances += tl.sum(own + between, axis=0)
        variance = distances / num_rows
        tl.store(batch_mean + cols, middle, mask=new)
        tl.store(batch_var + cols, variance, mask=new)
    if gamma is not None:
        if BATCH:
            known = inside
            if partials is not None:
                known = inside & (cols < first)
            centre = tl.load(batch_mean + cols, mask=known, other=0.0)
            spread = tl.load(batch_var + cols, mask=known, other=1.0)
            if partials is not None:
                centre = tl.where(new, middle, centre)
                spread = tl.where(new, variance, spread)
            factor = tl.load(gamma + cols, mask=inside, other=0.0) / tl.sqrt_rn(spread + eps)
            offset = tl.load(beta + cols, mask=inside, other=0.0) - centre * factor
        else:
            factor, offset, _ = scale_and_shift(gamma, beta, mean, var, eps, cols, inside)
        tl.store(scale + cols, factor, mask=inside)
        tl.store(shift + cols, offset, mask=inside)


@triton.jit(**config.JIT)
def settle_kernel(
    partials,  # [tiles, 2, C]
    gamma,  # [C]
    var,  # [C]
    terms,  # [2, C] at any pitch
    norm_grad,  # [2, C]
    num_tiles,
    num_channels,
    terms_pitch,
    eps,
    BATCH: tl.constexpr,
    ADD: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """From tiles' sums of dz and dz (x - mean): the norm's gradients, and what it has the producer of x take off."""
    cols = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < num_channels
    dz = tl.zeros((CHANNELS,), tl.float32)
    distance = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, num_tiles, TILES):
        dz += tl.sum(load_tiles(partials, start, num_tiles, 0, cols, inside, num_channels, TILES), axis=0)
        distance += tl.sum(load_tiles(partials, start, num_tiles, 1, cols, inside, num_channels, TILES), axis=0)
    inverse = inverse_std(var, cols, inside, eps)
    tl.store(norm_grad + cols, distance * inverse, mask=inside)
    tl.store(norm_grad + num_channels + cols, dz, mask=inside)
    if BATCH or not ADD:
        scale = tl.load(gamma + cols, mask=inside, other=0.0) * inverse if BATCH else tl.zeros_like(inverse)
        p = scale * dz
        q = scale * inverse * inverse * distance
        if ADD:
            p += tl.load(terms + cols, mask=inside)
            q += tl.load(terms + terms_pitch + cols, mask=inside)
        tl.store(terms + cols, p, mask=inside)
        tl.store(terms + terms_pitch + cols, q, mask=inside)


def finish(
    partials: Partials | None,
    statistics: Tensor,  # [2, C]
    norm: Norm | None,
    group: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The last of `statistics` from the moments in parts; of the norm that reads all C channels its scale and shift,
    [2, C]; and where `group` names ranks that share batch statistics, how many values they have together.

    One launch, and with ranks a few more around their communication.
    """
    total = None
    if partials is not None and group:
        own, new = torch.empty_like(partials.values[0]), partials.values.shape[2]
        _finish(partials, own, None)
        own[1] *= partials.rows
        into = statistics[:, statistics.shape[1] - new :]
        total = dense_statistics.finish(own[None], [partials.rows], group, into)
        partials = None
    affine = None
    if norm is not None or partials is not None:
        affine = _finish(partials, statistics, norm)
    return affine, total


def _finish(partials: Partials | None, statistics: Tensor, norm: Norm | None) -> Tensor | None:
    channels = statistics.shape[1]
    measured = 0 if partials is None else partials.values.shape[2]
    affine = None if norm is None else torch.empty(2, channels, dtype=torch.float32, device=statistics.device)
    nothing = dict.fromkeys(("gamma", "beta", "mean", "var")) | {"eps": 0.0}
    finish_kernel[(ceil_div(channels, _CHANNELS),)](
        partials=None if partials is None else partials.values,
        batch_mean=statistics[0],
        batch_var=statistics[1],
        **(nothing if norm is None else by(norm, statistics)),
        scale=None if affine is None else affine[0],
        shift=None if affine is None else affine[1],
        num_tiles=0 if partials is None else partials.values.shape[0],
        tile_rows=0 if partials is None else partials.tile_rows,
        num_rows=0 if partials is None else partials.rows,
        first=channels - measured,
        measured=measured,
        BATCH=norm is not None and norm.mean is None,
        CHANNELS=_CHANNELS,
        TILES=_TILES,
        **_OPTIONS,
    )
    return affine


def settle(partials: Partials, norm: Norm, statistics: Tensor, terms: Tensor, *, add: bool) -> Tensor:
    """[2, C]: the gradients of the norm's weight and bias. Sets `terms` [2, C], or adds to it, what the mean and the
    variance of a batch take from the gradient of x in all. One launch."""
    tiles, _, channels = partials.values.shape
    norm_grad = torch.empty(2, channels, dtype=torch.float32, device=statistics.device)
    read = by(norm, statistics)
    settle_kernel[(ceil_div(channels, _CHANNELS),)](
        partials=partials.values,
        **{name: read[name] for name in ("gamma", "var", "eps")},
        terms=terms,
        norm_grad=norm_grad,
        num_tiles=tiles,
        num_channels=channels,
        terms_pitch=terms.stride(0),
        BATCH=norm.mean is None,
        ADD=add,
        CHANNELS=_CHANNELS,
        TILES=_TILES,
        **_OPTIONS,
    )
    return norm_grad
