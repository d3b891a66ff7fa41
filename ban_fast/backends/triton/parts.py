"""Rows held as a tuple of PARTS blocks [ROWS, BLOCK], so that their lanes need not add up to a power of two."""

import triton
import triton.language as tl

from ban_fast.backends.triton.rows import load_logits


@triton.jit
def largest(parts, PARTS: tl.constexpr):
    """[ROWS, 1] the row's maximum over its parts."""
    value = parts[0]
    for p in tl.static_range(1, PARTS):
        value = tl.maximum(value, parts[p])
    return tl.max(value, axis=1, keep_dims=True)


@triton.jit
def total(parts, PARTS: tl.constexpr):
    """[ROWS, 1] the row's sum over its parts."""
    value = parts[0]
    for p in tl.static_range(1, PARTS):
        value += parts[p]
    return tl.sum(value, axis=1, keep_dims=True)


@triton.jit
def load_parts(
    row, cols, masks, col_stride, BLOCK: tl.constexpr, PARTS: tl.constexpr, CONTIGUOUS: tl.constexpr, ACC: tl.constexpr
):
    """The parts of a row; cols [1 or ROWS, BLOCK] are the classes of the first, and the others follow at BLOCK's distance."""
    parts = ()
    for p in tl.static_range(PARTS):
        parts = parts + (load_logits(row, cols + p * BLOCK, col_stride, masks[p], CONTIGUOUS, ACC),)
    return parts
