"""CWTM's kernel: cross-entropy of every row times its share of the batch's confidence, and the gradient, in one launch."""

import triton
import triton.language as tl

from ban_fast.backends.triton import config
from ban_fast.backends.triton.confidence import batch_total, given_confidences
from ban_fast.backends.triton.parts import largest, load_parts, total
from ban_fast.backends.triton.row_math import divide, exp, label_term, number
from ban_fast.backends.triton.rows import (
    half_scale,
    is_last_program,
    load_logits,
    select_rows,
    settled,
    store_reduced,
)


@triton.jit
def _tile(
    z_row, grad_row, inside, sound, y, student_col, num_classes, slope,
    ACC: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """[rows, 1] cross-entropy of rows that stay on the chip, whose gradient is stored."""
    cols = tl.arange(0, BLOCK)[None, :]
    masks = ()
    for p in tl.static_range(PARTS):
        masks = masks + (inside & (cols < num_classes - p * BLOCK),)
    z = load_parts(z_row, cols, masks, student_col, BLOCK, PARTS, CONTIGUOUS, ACC)
    z_y = load_logits(z_row, y, student_col, inside, CONTIGUOUS, ACC)
    z_max = largest(z, PARTS)
    others = ()
    for p in tl.static_range(PARTS):
        others = others + (tl.where(cols == y - p * BLOCK, 0.0, exp(z[p] - z_max, ACC)),)
    rest = total(others, PARTS)
    ce, scale = label_term(rest, z_y, z_max, ACC)
    if grad_row is not None:
        for p in tl.static_range(PARTS):
            value = tl.where(cols == y - p * BLOCK, -rest, others[p]) * (scale * slope)
            value = tl.where(sound, value, 0.0).to(grad_row.dtype.element_ty)
            tl.store(grad_row + (cols + p * BLOCK), value, mask=masks[p])
    return ce


@triton.jit
def _row(
    z_row, grad_row, inside, sound, y, student_col, num_classes, slope,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """[1, 1] cross-entropy of a row of any length, read once for its sum and again for the gradient."""
    z_max = number(float("-inf"), ACC)
    rest_total = tl.zeros([1, BLOCK], ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)[None, :]
        z = load_logits(z_row, cols, student_col, sound & (cols < num_classes), CONTIGUOUS, ACC)
        z_largest = tl.max(z)
        if z_largest > z_max:
            rest_total = rest_total * exp(z_max - z_largest, ACC)
            z_max = z_largest
        rest_total += tl.where((cols == y) | (z == float("-inf")), 0.0, exp(z - z_max, ACC))
    rest = tl.sum(rest_total) + (z_max - z_max)  # NaN where no logit is finite
    ce, scale = label_term(rest, load_logits(z_row, y, student_col, sound, CONTIGUOUS, ACC), z_max, ACC)
    if grad_row is not None:
        for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK)[None, :]
            z = load_logits(z_row, cols, student_col, sound & (cols < num_classes), CONTIGUOUS, ACC)
            value = tl.where(cols == y, -rest, exp(z - z_max, ACC)) * (scale * slope)
            value = tl.where(sound, value, 0.0).to(grad_row.dtype.element_ty)
            tl.store(grad_row + cols, value, mask=inside & (cols < num_classes))
    return ce


@triton.jit(**config.JIT)
def cross_entropy_kernel(
    student,  # [R, C]
    labels,  # [R]
    teacher_rows,  # [R] or None
    confidence,  # [M], or with BY_ROW [R]; with LOG its logarithm
    totals,  # [2, num_totals] partial sums of it, or None: they are worked out here
    normalizer,  # 0-d, or None for the batch's own total
    grad,  # [R, C] or None
    grad_scale,  # 0-d, or None unless grad is fp16
    loss,  # 0-d; so kd and label
    kd,
    label,
    partials,  # [2, programs] and the divisor, 1
    counter,  # 0-d int32, 0 between launches
    num_rows: tl.int32,
    num_teacher_rows: tl.int64,
    num_classes: tl.int32,
    num_totals: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    ONLINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BY_ROW: tl.constexpr,
    LOG: tl.constexpr,
):
    program = tl.program_id(0)
    classes = (num_classes // ALIGN) * ALIGN
    student_row = (student_row // ALIGN) * ALIGN

    if totals is not None:
        whole, top = batch_total(totals, num_totals, LOG, TOTAL_BLOCK, ACC)
    elif normalizer is None or grad_scale is not None:
        whole, top = given_confidences(
            confidence, labels, teacher_rows, 0, 1, num_rows, num_teacher_rows, num_classes, ignore_index,
            TOTAL_BLOCK, ACC,
        )  # fmt: skip
    if normalizer is not None:
        whole = tl.load(normalizer).to(ACC)
        if LOG:
            whole = tl.log(whole)
    up = number(1.0, ACC)
    if grad_scale is not None:
        up, down = half_scale(exp(top - whole, ACC) if LOG else divide(top, whole, ACC))
        if program == 0:
            tl.store(grad_scale, down)

    label_total = tl.zeros([ROWS, 1], ACC)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=1 if ONLINE else STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = rows < num_rows
        kept, readable, sound, y, source = select_rows(
            rows, labels, teacher_rows, num_rows, num_teacher_rows, num_classes, ignore_index
        )
        c = tl.load(confidence + (rows if BY_ROW else source), mask=sound, other=0.0).to(ACC)
        weight = exp(c - whole, ACC) if LOG else divide(c, whole, ACC)
        z_row = student + rows.to(tl.int64) * student_row
        grad_row = grad
        if grad is not None:
            grad_row += rows.to(tl.int64) * classes
        if ONLINE:
            ce = _row(
                z_row, grad_row, inside, sound, y, student_col, classes, weight * up, ACC, BLOCK, STAGES, CONTIGUOUS
            )
        else:
            ce = _tile(
                z_row,
                grad_row,
                inside,
                sound,
                y,
                student_col,
                classes,
                weight * up,
                ACC,
                BLOCK,
                PARTS,
                CONTIGUOUS,
            )
        label_total += settled(tl.where(weight == 0.0, 0.0, weight * ce), kept, sound)

    if program == 0:
        tl.store(partials + 2 * tl.num_programs(0), number(1.0, ACC))
    tl.store(partials + program, number(0.0, ACC))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(tl.sum(label_total, axis=1), axis=0))
    if is_last_program(counter):
        one = number(1.0, ACC)
        store_reduced(partials, loss, kd, label, tl.num_programs(0), one, one, False, True, TOTAL_BLOCK, ACC)
