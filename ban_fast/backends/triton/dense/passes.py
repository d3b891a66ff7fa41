"""What moves a dense block's memory beside its products and convolutions: a launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton.dense import config
from ban_fast.backends.triton.dense.channels import (
    alignment,
    by,
    ceil_div,
    load_tile,
    relu,
    scale_and_shift,
    store_alignment,
    store_tile,
)
from ban_fast.backends.triton.dense.statistics import Partials, store_moments


@triton.jit
def own_tile(num_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tile of rows, the rows and the channels. Neighbours share their rows."""
    across = tl.cdiv(num_channels, CHANNELS)
    tile = tl.program_id(0) // across
    cols = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    return tile, tile * ROWS + tl.arange(0, ROWS), cols


@triton.jit(**config.JIT)
def place_kernel(
    x,  # [R, C]
    out,  # [R, C]
    partials,  # [tiles, 2, C] or None
    num_rows,
    num_channels,
    x_pitch,
    out_pitch,
    X_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = x, and its moments."""
    tile, rows, cols = own_tile(num_channels, ROWS, CHANNELS)
    values = load_tile(x, rows, cols, num_rows, num_channels, x_pitch, X_ALIGN)
    store_tile(out, rows, cols, values, num_rows, num_channels, out_pitch, OUT_ALIGN)
    if partials is not None:
        store_moments(partials, values.to(tl.float32), tile, rows, cols, num_rows, num_channels, ROWS)


@triton.jit(**config.JIT)
def activate_kernel(
    x,  # [R, C]
    gamma,  # [C], as the following
    beta,
    mean,
    var,
    out,  # [R, C]
    num_rows,
    num_channels,
    x_pitch,
    out_pitch,
    eps,
    X_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = relu(norm(x))."""
    _, rows, cols = own_tile(num_channels, ROWS, CHANNELS)
    scale, shift, _ = scale_and_shift(gamma, beta, mean, var, eps, cols, cols < num_channels)
    values = load_tile(x, rows, cols, num_rows, num_channels, x_pitch, X_ALIGN).to(tl.float32)
    a = relu(values * scale[None, :] + shift[None, :])
    store_tile(out, rows, cols, a, num_rows, num_channels, out_pitch, OUT_ALIGN)


@triton.jit(**config.JIT)
def average_kernel(
    x,  # [B share, C]
    gamma,  # [C], as the following
    beta,
    mean,
    var,
    out,  # [B, C]
    num_rows,
    num_channels,
    x_pitch,
    share,
    eps,
    X_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = the mean of relu(norm(x)) over each image's `share` rows."""
    image, cols = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < num_channels
    scale, shift, _ = scale_and_shift(gamma, beta, mean, var, eps, cols, inside)
    sums = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, share, ROWS):
        pixels = start + tl.arange(0, ROWS)
        rows = image * share + pixels
        values = load_tile(x, rows, cols, num_rows, num_channels, x_pitch, X_ALIGN).to(tl.float32)
        a = relu(values * scale[None, :] + shift[None, :])
        sums += tl.sum(tl.where((pixels < share)[:, None], a, 0.0), axis=0)
    place = out + image.to(tl.int64) * num_channels + cols
    tl.store(place, (sums / share).to(out.dtype.element_ty), mask=inside)


@triton.jit(**config.JIT)
def deposit_kernel(
    grad,  # [R / share, C]
    x,  # [R, C]
    gamma,  # [C], as the following
    beta,
    mean,
    var,
    into,  # [R, C] or None
    partials,  # [tiles, 2, C]
    num_rows,
    num_channels,
    grad_pitch,
    x_pitch,
    into_pitch,
    share,
    eps,
    GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    INTO_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dz = grad / share where relu(norm(x)) let x through, grad's rows being of `share` rows each: a tile's sums of dz
    and dz (x - mean), and into = scale dz."""
    tile, rows, cols = own_tile(num_channels, ROWS, CHANNELS)
    inside = cols < num_channels
    scale, shift, middle = scale_and_shift(gamma, beta, mean, var, eps, cols, inside)
    values = load_tile(x, rows, cols, num_rows, num_channels, x_pitch, X_ALIGN).to(tl.float32)
    given = load_tile(grad, rows // share, cols, num_rows // share, num_channels, grad_pitch, GRAD_ALIGN)
    dz = tl.where(values * scale[None, :] + shift[None, :] <= 0.0, 0.0, given.to(tl.float32) / share)
    place = partials + tile.to(tl.int64) * 2 * num_channels + cols
    tl.store(place, tl.sum(dz, axis=0), mask=inside)
    tl.store(place + num_channels, tl.sum(dz * (values - middle[None, :]), axis=0), mask=inside)
    if into is not None:
        store_tile(into, rows, cols, dz * scale[None, :], num_rows, num_channels, into_pitch, INTO_ALIGN)


@triton.jit(**config.JIT)
def correct_kernel(
    grad,  # [R, C]
    x,  # [R, C]
    gamma,  # [C], as the following; all but mean may be None
    beta,
    mean,
    var,
    terms,  # [2, C] at any pitch
    total,  # []
    out,  # [R, C]
    num_rows,
    num_channels,
    grad_pitch,
    x_pitch,
    out_pitch,
    terms_pitch,
    eps,
    GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = g - p - (x - mean) q, (p, q) = terms / total; g is grad, or with a norm scale dz."""
    _, rows, cols = own_tile(num_channels, ROWS, CHANNELS)
    inside = cols < num_channels
    values = load_tile(x, rows, cols, num_rows, num_channels, x_pitch, X_ALIGN).to(tl.float32)
    g = load_tile(grad, rows, cols, num_rows, num_channels, grad_pitch, GRAD_ALIGN).to(tl.float32)
    if gamma is not None:
        scale, shift, middle = scale_and_shift(gamma, beta, mean, var, eps, cols, inside)
        g = tl.where(values * scale[None, :] + shift[None, :] <= 0.0, 0.0, g) * scale[None, :]
    else:
        middle = tl.load(mean + cols, mask=inside, other=0.0)
    over = tl.load(total)
    p = tl.load(terms + cols, mask=inside, other=0.0) / over
    q = tl.load(terms + terms_pitch + cols, mask=inside, other=0.0) / over
    g -= p[None, :] + (values - middle[None, :]) * q[None, :]
    store_tile(out, rows, cols, g, num_rows, num_channels, out_pitch, OUT_ALIGN)


def place(x: Tensor, out: Tensor, *, measured: bool) -> Partials | None:  # [R, C] both, any pitch
    """out = x; if `measured`, its moments in parts."""
    num_rows, channels = x.shape
    rows, across = config.pass_tile(num_rows, channels)
    tiles = ceil_div(num_rows, rows)
    partials = Partials.of(tiles, rows, num_rows, x) if measured else None
    place_kernel[(tiles * ceil_div(channels, across),)](
        x=x,
        out=out,
        partials=None if partials is None else partials.values,
        num_rows=num_rows,
        num_channels=channels,
        x_pitch=x.stride(0),
        out_pitch=out.stride(0),
        X_ALIGN=alignment(x),
        OUT_ALIGN=store_alignment(out),
        ROWS=rows,
        CHANNELS=across,
        **config.PASS_OPTIONS,
    )
    return partials


def activate(x: Tensor, norm: Norm, statistics: Tensor) -> Tensor:  # [R, C], [2, C] -> [R, C]
    """relu(norm(x)), contiguous."""
    num_rows, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, across = config.pass_tile(num_rows, channels)
    activate_kernel[(ceil_div(num_rows, rows) * ceil_div(channels, across),)](
        x=x,
        **by(norm, statistics),
        out=out,
        num_rows=num_rows,
        num_channels=channels,
        x_pitch=x.stride(0),
        out_pitch=out.stride(0),
        X_ALIGN=alignment(x),
        OUT_ALIGN=store_alignment(out),
        ROWS=rows,
        CHANNELS=across,
        **config.PASS_OPTIONS,
    )
    return out


def average(x: Tensor, norm: Norm, statistics: Tensor, images: int) -> Tensor:  # [R, C], [2, C] -> [images, C]
    """The mean of relu(norm(x)) over each image's rows."""
    num_rows, channels = x.shape
    out = torch.empty(images, channels, dtype=x.dtype, device=x.device)
    rows, across = config.pass_tile(0, channels)
    average_kernel[(images, ceil_div(channels, across))](
        x=x,
        **by(norm, statistics),
        out=out,
        num_rows=num_rows,
        num_channels=channels,
        x_pitch=x.stride(0),
        share=num_rows // images,
        X_ALIGN=alignment(x),
        ROWS=rows,
        CHANNELS=across,
        **config.PASS_OPTIONS,
    )
    return out


def deposit(
    grad: Tensor,  # [R / n, C], contiguous: of the activations, or of their mean over n rows
    x: Tensor,  # [R, C], any pitch
    norm: Norm,
    statistics: Tensor,  # [2, C]
    into: Tensor | None = None,  # [R, C] fp32
) -> Partials:
    """Through ReLU and the norm: into = scale dz. Returns sums of dz and dz (x - mean) in parts."""
    num_rows, channels = x.shape
    rows, across = config.pass_tile(num_rows, channels)
    tiles = ceil_div(num_rows, rows)
    partials = Partials.of(tiles, rows, num_rows, x)
    deposit_kernel[(tiles * ceil_div(channels, across),)](
        grad=grad,
        x=x,
        **by(norm, statistics),
        into=into,
        partials=partials.values,
        num_rows=num_rows,
        num_channels=channels,
        grad_pitch=grad.stride(0),
        x_pitch=x.stride(0),
        into_pitch=0 if into is None else into.stride(0),
        share=num_rows // grad.shape[0],
        GRAD_ALIGN=alignment(grad),
        X_ALIGN=alignment(x),
        INTO_ALIGN=1 if into is None else store_alignment(into),
        ROWS=rows,
        CHANNELS=across,
        **config.PASS_OPTIONS,
    )
    return partials


def correct(
    grad: Tensor,  # [R, C], any pitch
    x: Tensor,  # [R, C], any pitch
    statistics: Tensor,  # [2, C]
    terms: Tensor,  # [2, C]
    total: Tensor,  # []
    out: Tensor,  # [R, C], any pitch; may be grad
    norm: Norm | None = None,
) -> None:
    """out = g - p - (x - mean) q with (p, q) = terms / total: what all batch norms of x take from its gradient. g is
    grad, or with a norm of x what goes through that and ReLU."""
    num_rows, channels = x.shape
    rows, across = config.pass_tile(num_rows, channels)
    vectors = {"gamma": None, "beta": None, "mean": statistics[0], "var": None, "eps": 0.0}
    correct_kernel[(ceil_div(num_rows, rows) * ceil_div(channels, across),)](
        grad=grad,
        x=x,
        **(vectors if norm is None else by(norm, statistics)),
        terms=terms,
        total=total,
        out=out,
        num_rows=num_rows,
        num_channels=channels,
        grad_pitch=grad.stride(0),
        x_pitch=x.stride(0),
        out_pitch=out.stride(0),
        terms_pitch=terms.stride(0),
        GRAD_ALIGN=alignment(grad),
        X_ALIGN=alignment(x),
        OUT_ALIGN=store_alignment(out),
        ROWS=rows,
        CHANNELS=across,
        **config.PASS_OPTIONS,
    )
