"""The launch before a loss kernel that counts the rows kept in a large batch."""

import triton
import triton.language as tl

from ban_fast.backends.triton import config
from ban_fast.backends.triton.rows import count_kept


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
