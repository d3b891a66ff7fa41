"""What the dense block's kernels share: tiles of pitched rows, and a norm with its statistics put in."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.dense_shape import Norm


@triton.jit
def load_tile(base, rows, cols, num_rows, num_cols, pitch, ALIGN: tl.constexpr):
    """[ROWS, COLS]: 0 beyond the rows; beyond the columns 0 too, or up to the next ALIGN whatever lies there.

    That keeps loads wide: compared with a number of columns that ALIGN divides, neighbours are masked together.
    """
    stride = (pitch // ALIGN) * ALIGN
    mask = (rows < num_rows)[:, None] & (cols < tl.cdiv(num_cols, ALIGN) * ALIGN)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, rows, cols, value, num_rows, num_cols, pitch, ALIGN: tl.constexpr):
    """[ROWS, COLS], rounded to the tensor's dtype; nothing beyond the rows, nor beyond the columns where ALIGN divides
    them (`store_alignment`)."""
    stride = (pitch // ALIGN) * ALIGN
    mask = (rows < num_rows)[:, None] & (cols < tl.cdiv(num_cols, ALIGN) * ALIGN)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def inverse_std(var, cols, inside, eps):
    """[COLS] 1 / sqrt(var + eps)."""
    return 1.0 / tl.sqrt_rn(tl.load(var + cols, mask=inside, other=1.0) + eps)


@triton.jit
def scale_and_shift(gamma, beta, mean, var, eps, cols, inside):
    """[COLS] each: the norm as x * scale + shift, and its mean; 0 where not inside."""
    scale = tl.load(gamma + cols, mask=inside, other=0.0) * inverse_std(var, cols, inside, eps)
    middle = tl.load(mean + cols, mask=inside, other=0.0)
    return scale, tl.load(beta + cols, mask=inside, other=0.0) - middle * scale, middle


@triton.jit
def relu(z):
    """NaN stays NaN, as in torch."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A product's. For TF32 it is the nearest one: tensor cores cut fp32 off, which makes every product too small."""
    if PRECISION == "tf32":
        nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000  # ties away from zero; NaN would overflow
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x


def by(norm: Norm, statistics: Tensor) -> dict[str, Any]:  # [2, C]
    """A norm as kernels take it: gamma, beta, mean, var and eps. `statistics` are the batch's."""
    mean, var = statistics.unbind() if norm.mean is None else (norm.mean, norm.var)
    assert var is not None
    vectors = {"gamma": norm.weight, "beta": norm.bias, "mean": mean, "var": var}
    return {name: vector.contiguous() for name, vector in vectors.items()} | {"eps": norm.eps}


def alignment(x: Tensor) -> int:  # [R, C], any pitch
    """How many elements, of 16 bytes at most, divide the pitch and the place in memory: a thread's one load."""
    assert x.stride(1) == 1 or x.shape[1] < 2, f"strides {x.stride()}: channels must be neighbours"
    size = x.element_size()
    return math.gcd(16 // size, x.stride(0), x.data_ptr() // size)


def store_alignment(x: Tensor) -> int:  # [R, C], any pitch
    """`alignment`, for what must not be written beyond x's channels."""
    return math.gcd(alignment(x), x.shape[1])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
