"""CWTM's confidences: the teacher's largest probability of every row or the label's, and what they add up to.

Totals come as partial sums [2, programs]: for confidences c, sum of c and max c; for logarithms, the sum of exp(log c - m)
and m, the largest log c. `batch_total` puts them together.
"""

import triton
import triton.language as tl

from ban_fast.backends.triton import config
from ban_fast.backends.triton.row_math import LOG2_E, divide, exp, number
from ban_fast.backends.triton.rows import load_logits, max_and_sum, select_rows


@triton.jit
def given_confidences(
    confidence, labels, teacher_rows, first, step, num_rows, num_teacher_rows, num_classes, ignore_index,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum and maximum of the sound rows' confidences [M], of blocks first, first + step, ... of BLOCK rows."""
    total = tl.zeros([BLOCK], ACC)
    largest = tl.zeros([BLOCK], ACC)
    for block in range(first, tl.cdiv(num_rows, BLOCK), step):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        kept, readable, sound, label, teacher_row = select_rows(
            rows, labels, teacher_rows, num_rows, num_teacher_rows, num_classes, ignore_index
        )
        value = tl.load(confidence + teacher_row, mask=sound, other=0.0).to(ACC)
        total += value
        largest = tl.maximum(largest, value)
    return tl.sum(total, axis=0), tl.max(largest, axis=0)


@triton.jit
def batch_total(totals, programs, LOG: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The batch's total (with LOG its logarithm) and its largest confidence, from partial sums [2, programs]."""
    nothing = float("-inf") if LOG else 0.0
    largest = tl.full([BLOCK], nothing, ACC)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        partial = tl.load(totals + programs + offsets, mask=offsets < programs, other=nothing)
        largest = tl.maximum(largest, partial)
    top = tl.max(largest, axis=0)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < programs
        partial = tl.load(totals + offsets, mask=inside, other=0.0)
        if LOG:
            maximum = tl.load(totals + programs + offsets, mask=inside, other=nothing)
            partial = tl.where(partial == 0.0, 0.0, partial * exp(maximum - top, ACC))
        total += partial
    value = tl.sum(total, axis=0)
    return (top + tl.log(value) if LOG else value), top


@triton.jit(**config.JIT)
def given_confidences_kernel(
    confidence,  # [M]
    labels,  # [R]
    teacher_rows,  # [R] or None
    totals,  # [2, programs]
    num_rows: tl.int32,
    num_teacher_rows: tl.int64,
    num_classes: tl.int32,
    ignore_index: tl.int64,
    TOTAL_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The batch's partial sums, for a batch too large for every program of the loss to go through."""
    program = tl.program_id(0)
    total, largest = given_confidences(
        confidence, labels, teacher_rows, program, tl.num_programs(0),
        num_rows, num_teacher_rows, num_classes, ignore_index, TOTAL_BLOCK, ACC,
    )  # fmt: skip
    tl.store(totals + program, total)
    tl.store(totals + tl.num_programs(0) + program, largest)


@triton.jit(**config.JIT)
def teacher_confidences_kernel(
    teacher,  # [M, C]
    labels,  # [R]
    teacher_rows,  # [R] or None
    confidence,  # [R]: c, or with LOG log c
    totals,  # [2, programs]
    num_rows: tl.int32,
    num_teacher_rows: tl.int64,
    num_classes: tl.int32,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    LOG: tl.constexpr,
    ACC: tl.constexpr,
):
    """c = max p (eq 10), or with LOG log p of the label (eq 9), of every row, and the batch's partial sums."""
    program = tl.program_id(0)
    classes = (num_classes // ALIGN) * ALIGN
    teacher_row = (teacher_row // ALIGN) * ALIGN
    heat = (number(1.0, ACC), number(1.0, ACC), number(LOG2_E, ACC))
    total = tl.zeros([ROWS, 1], ACC)
    largest = tl.full([ROWS, 1], float("-inf") if LOG else 0.0, ACC)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        kept, readable, sound, y, source = select_rows(
            rows, labels, teacher_rows, num_rows, num_teacher_rows, num_classes, ignore_index
        )
        t_row = teacher + source * teacher_row
        t_max, t_sum = max_and_sum(t_row, sound, teacher_col, classes, heat, ROWS, BLOCK, STAGES, CONTIGUOUS, ACC)
        if LOG:
            t_y = load_logits(t_row, y, teacher_col, sound, CONTIGUOUS, ACC)
            value = tl.where(sound, (t_y - t_max) - tl.log(t_sum), float("-inf"))
            top = tl.maximum(largest, value)
            total = tl.where(largest == top, total, total * exp(largest - top, ACC))
            total += tl.where(value == float("-inf"), 0.0, exp(value - top, ACC))
            largest = top
        else:
            value = tl.where(sound, divide(number(1.0, ACC), t_sum, ACC), 0.0)
            total += value
            largest = tl.maximum(largest, value)
        tl.store(confidence + rows, value, mask=rows < num_rows)
    top = tl.max(tl.max(largest, axis=1), axis=0)
    if LOG:
        total = tl.where(total == 0.0, 0.0, total * exp(largest - top, ACC))
    tl.store(totals + program, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(totals + tl.num_programs(0) + program, top)
