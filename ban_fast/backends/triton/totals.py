"""Small launches before and after a loss kernel: the count of kept rows in a large batch, and the sum of what programs left."""

import triton
import triton.language as tl

from ban_fast.backends.triton import config
from ban_fast.backends.triton.row_math import from_bits
from ban_fast.backends.triton.rows import count_kept, store_reduced


@triton.jit(**config.JIT)
def count_kernel(
    labels,  # [R]
    counts,  # [programs]
    num_rows: tl.int32,
    ignore_index: tl.int64,
    TOTAL_BLOCK: tl.constexpr,
):
    """The rows kept, counted by the programs in parts."""
    program = tl.program_id(0)
    ACC: tl.constexpr = counts.dtype.element_ty
    count = count_kept(labels, program, tl.num_programs(0), num_rows, ignore_index, TOTAL_BLOCK, ACC)
    tl.store(counts + program, count)


@triton.jit(**config.JIT)
def reduce_kernel(
    partials,  # [2, programs] and the divisor
    loss,  # 0-d; so kd and label
    kd,
    label,
    programs: tl.int32,
    kd_weight: tl.int64,
    label_weight: tl.int64,
    WITH_KD: tl.constexpr,
    WITH_LABEL: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the last program of a loss kernel does, where none could know that it is the last."""
    store_reduced(
        partials, loss, kd, label, programs, from_bits(kd_weight, ACC), from_bits(label_weight, ACC),
        WITH_KD, WITH_LABEL, TOTAL_BLOCK, ACC,
    )  # fmt: skip
