"""The 1x1 convolutions: products whose operand relu(norm(x)) is made while x is loaded, forward and backward."""

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
    operand,
    relu,
    scale_and_shift,
    store_alignment,
    store_tile,
)
from ban_fast.backends.triton.dense.statistics import Partials, store_moments
from ban_fast.backends.triton.launch import multiprocessors


@triton.jit(**config.JIT)
def project_kernel(
    x,  # [R, in]
    scale,  # [in]
    shift,  # [in]
    weight,  # [out, in], 0 up to the next WEIGHT_ALIGN
    out,  # [R, out]
    partials,  # [tiles, 2, out] or None
    num_rows,
    num_in,
    num_out,
    x_pitch,
    weight_pitch,
    out_pitch,
    X_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = relu(x * scale + shift) @ weight^T, and the moments of what was stored. Neighbours share their rows of x."""
    across = tl.cdiv(num_out, CHANNELS)
    tile = tl.program_id(0) // across
    rows = tile * ROWS + tl.arange(0, ROWS)
    outs = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, num_in, DEPTH):
        cols = start + tl.arange(0, DEPTH)
        inside = cols < num_in
        factor = tl.load(scale + cols, mask=inside, other=0.0)[None, :]
        offset = tl.load(shift + cols, mask=inside, other=0.0)[None, :]
        values = load_tile(x, rows, cols, num_rows, num_in, x_pitch, X_ALIGN).to(tl.float32)
        a = tl.where(inside[None, :], relu(values * factor + offset), 0.0)  # what lies beyond may be NaN
        w = load_tile(weight, outs, cols, num_out, num_in, weight_pitch, WEIGHT_ALIGN)
        acc = tl.dot(operand(a.to(w.dtype), PRECISION), operand(tl.trans(w), PRECISION), acc, input_precision=PRECISION)
    stored = acc.to(out.dtype.element_ty)
    store_tile(out, rows, outs, stored, num_rows, num_out, out_pitch, OUT_ALIGN)
    if partials is not None:
        store_moments(partials, stored.to(tl.float32), tile, rows, outs, num_rows, num_out, ROWS)


@triton.jit(**config.JIT)
def unproject_kernel(
    grad,  # [R, in]
    weight,  # [in, out]
    x,  # [R, out]
    gamma,  # [out], as the following
    beta,
    mean,
    var,
    into,  # [R, out]
    partials,  # [tiles, 2, out]
    num_rows,
    num_in,
    num_out,
    grad_pitch,
    weight_pitch,
    x_pitch,
    into_pitch,
    eps,
    GRAD_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    INTO_ALIGN: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dz = grad @ weight where relu(norm(x)) let x through: into (+)= scale dz, and a tile's sums of dz and
    dz (x - mean)."""
    across = tl.cdiv(num_out, CHANNELS)
    tile = tl.program_id(0) // across
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, num_in, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        g = load_tile(grad, rows, depth, num_rows, num_in, grad_pitch, GRAD_ALIGN)
        w = load_tile(weight, depth, cols, num_in, num_out, weight_pitch, WEIGHT_ALIGN)
        acc = tl.dot(operand(g, PRECISION), operand(w, PRECISION), acc, input_precision=PRECISION)
    inside = cols < num_out
    scale, shift, middle = scale_and_shift(gamma, beta, mean, var, eps, cols, inside)
    values = load_tile(x, rows, cols, num_rows, num_out, x_pitch, X_ALIGN).to(tl.float32)
    dz = tl.where(values * scale[None, :] + shift[None, :] <= 0.0, 0.0, acc)
    place = partials + tile.to(tl.int64) * 2 * num_out + cols
    tl.store(place, tl.sum(dz, axis=0), mask=inside)
    tl.store(place + num_out, tl.sum(dz * (values - middle[None, :]), axis=0), mask=inside)
    result = dz * scale[None, :]
    # Up to INTO_ALIGN beyond the columns what is read goes back: scale and dz are 0, and no other program writes there.
    if ADD:
        result += load_tile(into, rows, cols, num_rows, num_out, into_pitch, INTO_ALIGN)
    store_tile(into, rows, cols, result, num_rows, num_out, into_pitch, INTO_ALIGN)


@triton.jit(**config.JIT)
def weight_kernel(
    grad,  # [R, out]
    x,  # [R, in]
    gamma,  # [in], as the following
    beta,
    mean,
    var,
    partials,  # [splits, out, in], or for one split the gradient itself
    num_rows,
    num_out,
    num_in,
    grad_pitch,
    x_pitch,
    split_rows,
    eps,
    GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """grad^T @ relu(norm(x)) over one split's rows of both."""
    across = tl.cdiv(num_in, CHANNELS)
    outs = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    scale, shift, _ = scale_and_shift(gamma, beta, mean, var, eps, cols, cols < num_in)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, num_rows), DEPTH):
        rows = start + tl.arange(0, DEPTH)
        g = load_tile(grad, rows, outs, num_rows, num_out, grad_pitch, GRAD_ALIGN)
        values = load_tile(x, rows, cols, num_rows, num_in, x_pitch, X_ALIGN).to(tl.float32)
        a = relu(values * scale[None, :] + shift[None, :]).to(g.dtype)
        acc = tl.dot(operand(tl.trans(g), PRECISION), operand(a, PRECISION), acc, input_precision=PRECISION)
    place = partials + split.to(tl.int64) * num_out * num_in + outs[:, None] * num_in + cols[None, :]
    inside = (outs < num_out)[:, None] & (cols < num_in)[None, :]
    tl.store(place, acc.to(partials.dtype.element_ty), mask=inside)


@triton.jit(**config.JIT)
def sum_kernel(partials, out, size, num_splits, BLOCK: tl.constexpr):  # [splits, size], [size]
    """out = the sum over splits, in their order."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        total += tl.load(partials + split * size + places, mask=places < size, other=0.0)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=places < size)


def project(
    x: Tensor,  # [R, in], any pitch
    affine: Tensor,  # [2, in]: scale and shift
    weight: Tensor,  # [out, in, 1, 1]
    out: Tensor,  # [R, out], any pitch
    *,
    measured: bool,
) -> Partials | None:
    """out = relu(x * scale + shift) @ weight^T; if `measured`, its moments in parts. One launch."""
    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    weight, how = packed(weight), config.precision(x)
    tile = config.project_tile(num_rows, num_out, x.dtype, how)
    tiles = ceil_div(num_rows, tile.rows)
    partials = Partials.of(tiles, tile.rows, num_rows, out) if measured else None
    project_kernel[(tiles * ceil_div(num_out, tile.channels),)](
        x=x,
        scale=affine[0],
        shift=affine[1],
        weight=weight,
        out=out,
        partials=None if partials is None else partials.values,
        num_rows=num_rows,
        num_in=num_in,
        num_out=num_out,
        x_pitch=x.stride(0),
        weight_pitch=weight.stride(0),
        out_pitch=out.stride(0),
        X_ALIGN=alignment(x),
        WEIGHT_ALIGN=alignment(weight),
        OUT_ALIGN=store_alignment(out),
        PRECISION=how,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        DEPTH=tile.depth,
        **tile.options(),
    )
    return partials


def unproject(
    grad: Tensor,  # [R, out], contiguous
    weight: Tensor,  # [out, in, 1, 1]
    x: Tensor,  # [R, in], any pitch
    norm: Norm,
    statistics: Tensor,  # [2, in]
    into: Tensor,  # [R, in] fp32, of a pitch that 16 bytes divide
    *,
    add: bool,
) -> Partials:
    """Through the convolution, ReLU and the norm: into = scale dz, or += it. Returns sums of dz and dz (x - mean) in
    parts. One launch."""
    (num_rows, num_out), how = x.shape, config.precision(x)
    weight = packed(weight)
    tile = config.unproject_tile(num_rows, x.dtype, how)
    tiles = ceil_div(num_rows, tile.rows)
    partials = Partials.of(tiles, tile.rows, num_rows, x)
    unproject_kernel[(tiles * ceil_div(num_out, tile.channels),)](
        grad=grad,
        weight=weight,
        x=x,
        **by(norm, statistics),
        into=into,
        partials=partials.values,
        num_rows=num_rows,
        num_in=grad.shape[1],
        num_out=num_out,
        grad_pitch=grad.stride(0),
        weight_pitch=weight.stride(0),
        x_pitch=x.stride(0),
        into_pitch=into.stride(0),
        GRAD_ALIGN=alignment(grad),
        WEIGHT_ALIGN=alignment(weight),
        X_ALIGN=alignment(x),
        INTO_ALIGN=alignment(into),
        ADD=add,
        PRECISION=how,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        DEPTH=tile.depth,
        **tile.options(),
    )
    return partials


def weight_gradient(
    grad: Tensor,  # [R, out], contiguous
    x: Tensor,  # [R, in], any pitch
    norm: Norm,
    statistics: Tensor,  # [2, in]
    weight: Tensor,  # [out, in, 1, 1]
) -> Tensor:
    """The gradient of `weight`, like it. One launch, or two where pixels are split."""
    (num_rows, num_in), num_out, how = x.shape, weight.shape[0], config.precision(x)
    tile = config.weight_tile(x.dtype, how)
    tiles = ceil_div(num_out, tile.rows) * ceil_div(num_in, tile.channels)
    splits, split_rows = config.splits(tiles, num_rows, tile, multiprocessors(x.device))
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    shape = (splits, num_out, num_in)
    partials = result if splits == 1 else torch.empty(shape, dtype=torch.float32, device=x.device)
    weight_kernel[(tiles, splits)](
        grad=grad,
        x=x,
        **by(norm, statistics),
        partials=partials,
        num_rows=num_rows,
        num_out=num_out,
        num_in=num_in,
        grad_pitch=grad.stride(0),
        x_pitch=x.stride(0),
        split_rows=split_rows,
        GRAD_ALIGN=alignment(grad),
        X_ALIGN=alignment(x),
        PRECISION=how,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        DEPTH=tile.depth,
        **tile.options(),
    )
    if splits > 1:
        size, block = result.numel(), 256
        options = config.PASS_OPTIONS
        sum_kernel[(ceil_div(size, block),)](partials, result, size=size, num_splits=splits, BLOCK=block, **options)
    return result


def packed(weight: Tensor) -> Tensor:  # [out, in, 1, 1] -> [out, in]
    """The matrix, each of its rows at a place that 8 bytes divide: itself, or a copy that is 0 between its rows.

    Then a thread copies 8 bytes or 16 at a time; the odd growth of densenet-112-33 would have it copy 2. What a thread
    copies beyond a row is multiplied by 0: in a matrix that is part of a wider one it could be NaN.
    """
    matrix = weight.reshape(weight.shape[0], weight.shape[1])
    if matrix.stride(1) == 1:
        together = alignment(matrix)
        if together * matrix.element_size() >= 8 and matrix.shape[1] % together == 0:
            return matrix
    step = 16 // matrix.element_size()
    room = matrix.new_zeros(matrix.shape[0], ceil_div(matrix.shape[1], step) * step)
    room[:, : matrix.shape[1]] = matrix
    return room[:, : matrix.shape[1]]
