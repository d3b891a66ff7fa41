"""The kernel of KD and DKPP: one launch gives loss, terms and gradient.

A program takes every `programs`-th tile of ROWS rows: on the chip (`distill_tile`), or ONLINE a row at a time
(`distill_online`). What it adds up it leaves in `partials`, and the last program to finish adds those in a fixed order.
"""

import triton
import triton.language as tl

from ban_fast.backends.triton import config
from ban_fast.backends.triton.distill_online import distill_row
from ban_fast.backends.triton.distill_tile import distill_tile
from ban_fast.backends.triton.permute import NONE, row_key
from ban_fast.backends.triton.permuted_rows import ranked_classes, write_permuted
from ban_fast.backends.triton.row_math import divide, from_bits, number
from ban_fast.backends.triton.rows import (
    UNREDUCED,
    half_scale,
    is_last_program,
    kept_count,
    select_rows,
    settled,
    store_reduced,
    weighted,
)


@triton.jit(**config.JIT)
def distill_kernel(
    student,  # [R, C]
    teacher,  # [M, C]
    labels,  # [R] or None
    teacher_rows,  # [R] or None
    sample_ids,  # [R] or None
    step,  # 0-d or None
    grad,  # [R, C] or None
    grad_scale,  # 0-d, or None unless grad is fp16
    loss,  # 0-d, or [R] unreduced; so kd and label
    kd,
    label,
    partials,  # [2, programs] and the divisor, or None unreduced
    counter,  # 0-d int32, 0 between launches, or None unreduced
    counts,  # [num_counts] partial counts of the rows kept, or None: they are counted here
    tables,  # [programs, ROWS, ROUNDS, TABLE] uint8 or int32, or None
    walks,  # [programs, ROWS, WALK] int32, or None
    scratch,  # [programs, ROWS, C] of the teacher's type, or None where rows are permuted in registers
    num_rows: tl.int32,
    num_teacher_rows: tl.int64,
    num_classes: tl.int32,
    num_counts: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.int64,
    inverse: tl.int64,  # 1 / T
    exp_scale: tl.int64,  # log2(e) / T
    kd_scale: tl.int64,  # of the KD term: T^2 or 1
    kd_slope: tl.int64,  # of q - p in the gradient
    kd_weight: tl.int64,
    label_weight: tl.int64,
    prefix_0: tl.int32,
    prefix_1: tl.int32,
    feistel_a: tl.int32,
    feistel_b: tl.int32,
    reciprocal: tl.int32,
    ACC: tl.constexpr,
    ONLINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    REDUCTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_LABEL: tl.constexpr,
    T_KIND: tl.constexpr,
    SHORT: tl.constexpr,
    PERMUTE: tl.constexpr,
    ROUNDS: tl.constexpr,
    TABLE: tl.constexpr,
    WALK: tl.constexpr,
):
    program = tl.program_id(0)
    classes = (num_classes // ALIGN) * ALIGN
    student_row = (student_row // ALIGN) * ALIGN
    teacher_row = (teacher_row // ALIGN) * ALIGN
    heat = (from_bits(temperature, ACC), from_bits(inverse, ACC), from_bits(exp_scale, ACC))
    weight_kd = from_bits(kd_weight, ACC)
    weight_label = from_bits(label_weight, ACC)
    slots = program * ROWS + tl.arange(0, ROWS)[:, None]
    if tables is not None:
        tables += slots * (ROUNDS * TABLE)
    if walks is not None:
        walks += slots * WALK
    if scratch is not None:
        scratch += slots.to(tl.int64) * classes

    count = kept_count(labels, counts, num_counts, num_rows, ignore_index, REDUCTION, TOTAL_BLOCK, ACC)
    each = divide(number(1.0, ACC), count, ACC)
    if grad_scale is not None:
        up, down = half_scale(from_bits(kd_slope, ACC) * each + weight_label * each)
        each *= up
        if program == 0:
            tl.store(grad_scale, down)

    if REDUCTION != UNREDUCED:
        if program == 0:
            tl.store(partials + 2 * tl.num_programs(0), count)
    kd_total = tl.zeros([ROWS, 1], ACC)
    label_total = tl.zeros([ROWS, 1], ACC)
    # What does not change from row to row is worked out anew: kept, it would push the rows themselves out of registers.
    for tile in tl.range(
        program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=1 if ONLINE else STAGES, disable_licm=True
    ):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        kept, readable, sound, y, source = select_rows(
            rows, labels, teacher_rows, num_rows, num_teacher_rows, num_classes, ignore_index
        )
        z_row = student + rows.to(tl.int64) * student_row
        t_row = teacher + source * teacher_row
        grad_row = grad
        if grad is not None:
            grad_row += rows.to(tl.int64) * classes
        wanted = labels
        if labels is not None:
            wanted = y
        slope_kd = from_bits(kd_slope, ACC) * each
        slope_label = weight_label * each
        inside = rows < num_rows
        cols = tl.arange(0, BLOCK)[None, :]
        sources = cols
        t_col = teacher_col
        if PERMUTE != NONE:
            k0, k1 = row_key(prefix_0, prefix_1, step, sample_ids, rows, kept)
            field = (classes, feistel_a, feistel_b, reciprocal, k0, k1, tables, walks)
            if scratch is None:
                cols, sources = ranked_classes(
                    t_row, teacher_col, readable, field, ROWS, BLOCK, CONTIGUOUS, PERMUTE, ROUNDS, WALK
                )
            else:
                write_permuted(
                    t_row, scratch, teacher_col, readable, field,
                    ROWS, BLOCK, CONTIGUOUS, PERMUTE, ROUNDS, TABLE, WALK,
                )  # fmt: skip
                t_row = scratch
                t_col = tl.full([], 1, tl.int64)
        if ONLINE:
            kd_value, label_value = distill_row(
                z_row, t_row, grad_row, inside, sound, wanted, student_col, t_col, classes, heat, slope_kd, slope_label,
                ACC, BLOCK, STAGES, CONTIGUOUS, ENTROPY, WITH_KD, WITH_LABEL, T_KIND, SHORT,
            )  # fmt: skip
        else:
            kd_value, label_value = distill_tile(
                z_row, t_row, grad_row, cols, sources, inside, readable, sound, wanted, student_col, t_col, classes,
                heat, slope_kd, slope_label,
                ACC, ROWS, BLOCK, PARTS, CONTIGUOUS, ENTROPY, WITH_KD, WITH_LABEL, T_KIND, SHORT,
            )  # fmt: skip
        kd_value = settled(kd_value * from_bits(kd_scale, ACC), kept, sound)
        label_value = settled(label_value, kept, sound) if labels is not None else tl.zeros([ROWS, 1], ACC)
        if REDUCTION == UNREDUCED:
            value = weighted(kd_value, label_value, weight_kd, weight_label, WITH_KD, WITH_LABEL)
            tl.store(loss + rows, value, mask=rows < num_rows)
            tl.store(kd + rows, kd_value, mask=rows < num_rows)
            tl.store(label + rows, label_value, mask=rows < num_rows)
        kd_total += kd_value
        label_total += label_value

    if REDUCTION != UNREDUCED:
        tl.store(partials + program, tl.sum(tl.sum(kd_total, axis=1), axis=0))
        tl.store(partials + tl.num_programs(0) + program, tl.sum(tl.sum(label_total, axis=1), axis=0))
        if is_last_program(counter):
            store_reduced(
                partials, loss, kd, label, tl.num_programs(0), weight_kd, weight_label,
                WITH_KD, WITH_LABEL, TOTAL_BLOCK, ACC,
            )  # fmt: skip
