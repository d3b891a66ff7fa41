"""DKPP's permuted distributions, and its permutation, as outputs: kernels and launches."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.triton import config, launch, permute
from ban_fast.backends.triton.permute import prepare, row_key
from ban_fast.backends.triton.permuted_rows import kept_class, source_classes
from ban_fast.backends.triton.row_math import divide, exp_below, from_bits
from ban_fast.backends.triton.rows import load_logits, max_and_sum, select_rows


@triton.jit(**config.JIT)
def targets_kernel(
    teacher,  # [M, C]
    teacher_rows,  # [R] or None
    sample_ids,  # [R] or None
    step,  # 0-d or None
    out,  # [R, C]
    tables,  # [programs, ROWS, ROUNDS, TABLE] uint8 or int32, or None
    walks,  # [programs, ROWS, WALK] int32, or None
    num_rows: tl.int32,
    num_teacher_rows: tl.int64,
    num_classes: tl.int32,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    temperature: tl.int64,
    inverse: tl.int64,
    exp_scale: tl.int64,
    prefix_0: tl.int32,
    prefix_1: tl.int32,
    feistel_a: tl.int32,
    feistel_b: tl.int32,
    reciprocal: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PERMUTE: tl.constexpr,
    ROUNDS: tl.constexpr,
    TABLE: tl.constexpr,
    WALK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)
    classes = (num_classes // ALIGN) * ALIGN
    teacher_row = (teacher_row // ALIGN) * ALIGN
    heat = (from_bits(temperature, ACC), from_bits(inverse, ACC), from_bits(exp_scale, ACC))
    slots = program * ROWS + tl.arange(0, ROWS)[:, None]
    if tables is not None:
        tables += slots * (ROUNDS * TABLE)
    if walks is not None:
        walks += slots * WALK
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        kept, readable, sound, y, source = select_rows(
            rows, None, teacher_rows, num_rows, num_teacher_rows, num_classes, 0
        )
        k0, k1 = row_key(prefix_0, prefix_1, step, sample_ids, rows, kept)
        field = (classes, feistel_a, feistel_b, reciprocal, k0, k1, tables, walks)
        prepare(field, ROWS, PERMUTE, ROUNDS, TABLE, WALK)
        t_row = teacher + source * teacher_row
        stays = kept_class(t_row, teacher_col, readable, classes, ROWS, BLOCK, CONTIGUOUS)
        t_max, t_sum = max_and_sum(t_row, readable, teacher_col, classes, heat, ROWS, BLOCK, STAGES, CONTIGUOUS, ACC)
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            mask = readable & (cols < classes)
            from_class = source_classes(cols, stays, field, PERMUTE, ROUNDS, TABLE, WALK)
            t = load_logits(t_row, from_class, teacher_col, mask, CONTIGUOUS, ACC)
            p = divide(exp_below(t, t_max, heat, ACC), t_sum, ACC)
            p = tl.where(readable, p, float("nan"))
            tl.store(out + rows.to(tl.int64) * classes + cols, p, mask=kept & (cols < classes))


@triton.jit(**config.JIT)
def permutation_kernel(
    argmax,  # [R]
    sample_ids,  # [R] or None
    step,  # 0-d or None
    out,  # [R, C]
    tables,
    walks,
    num_rows: tl.int32,
    num_classes: tl.int32,
    prefix_0: tl.int32,
    prefix_1: tl.int32,
    feistel_a: tl.int32,
    feistel_b: tl.int32,
    reciprocal: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    PERMUTE: tl.constexpr,
    ROUNDS: tl.constexpr,
    TABLE: tl.constexpr,
    WALK: tl.constexpr,
):
    program = tl.program_id(0)
    classes = (num_classes // ALIGN) * ALIGN
    slots = program * ROWS + tl.arange(0, ROWS)[:, None]
    if tables is not None:
        tables += slots * (ROUNDS * TABLE)
    if walks is not None:
        walks += slots * WALK
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = rows < num_rows
        k0, k1 = row_key(prefix_0, prefix_1, step, sample_ids, rows, inside)
        field = (classes, feistel_a, feistel_b, reciprocal, k0, k1, tables, walks)
        prepare(field, ROWS, PERMUTE, ROUNDS, TABLE, WALK)
        stays = tl.load(argmax + rows, mask=inside, other=0).to(tl.int32)
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            from_class = source_classes(cols, stays, field, PERMUTE, ROUNDS, TABLE, WALK)
            out_row = out + rows.to(tl.int64) * classes
            tl.store(out_row + cols, from_class.to(tl.int64), mask=inside & (cols < classes))


def permuted_targets(
    teacher: Tensor,  # [M, C]
    teacher_rows: Tensor | None,  # [R]
    permutation: permute.Permutation,
    temperature: float,
) -> Tensor:
    """See `interface.Backend.dkpp_targets`. One launch."""
    num_rows = teacher.shape[0] if teacher_rows is None else teacher_rows.shape[0]
    num_classes = teacher.shape[1]
    torch_acc, acc = launch.arithmetic(teacher)
    out = torch.empty((num_rows, num_classes), dtype=torch_acc, device=teacher.device)
    plan = config.blocks_plan(num_classes)
    programs = plan.programs(num_rows, launch.multiprocessors(teacher.device))
    if num_rows == 0:
        return out
    with launch.on(teacher.device):
        targets_kernel[(programs,)](
            teacher=teacher,
            teacher_rows=launch.dense(teacher_rows),
            out=out,
            num_rows=num_rows,
            num_teacher_rows=teacher.shape[0],
            num_classes=num_classes,
            teacher_row=teacher.stride(0),
            teacher_col=teacher.stride(1),
            STAGES=plan.stages,
            ALIGN=launch.alignment(num_classes, teacher),
            CONTIGUOUS=launch.contiguous(teacher),
            ACC=acc,
            **launch.heat(temperature, torch_acc == torch.float64),
            **_blocks(permutation, num_classes, plan, programs, teacher.device, torch_acc),
        )
    return out


def permutation_of(argmax: Tensor, permutation: permute.Permutation, num_classes: int) -> Tensor:
    """See `interface.Backend.dkpp_permutation`. One launch."""
    num_rows = argmax.shape[0]
    out = torch.empty((num_rows, num_classes), dtype=torch.int64, device=argmax.device)
    plan = config.blocks_plan(num_classes)
    programs = plan.programs(num_rows, launch.multiprocessors(argmax.device))
    if num_rows == 0:
        return out
    with launch.on(argmax.device):
        permutation_kernel[(programs,)](
            argmax=launch.dense(argmax),
            out=out,
            num_rows=num_rows,
            num_classes=num_classes,
            ALIGN=launch.alignment(num_classes),
            **_blocks(permutation, num_classes, plan, programs, argmax.device, out.dtype),
        )
    return out


def _blocks(
    permutation: permute.Permutation,
    num_classes: int,
    plan: config.Plan,
    programs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    arguments = permute.arguments(permutation, num_classes, programs * plan.rows, device, tables=True)
    return (
        arguments
        | {"ROWS": plan.rows, "BLOCK": plan.block}
        | plan.options(double=dtype == torch.float64)
        | launch.OPTIONS
    )
