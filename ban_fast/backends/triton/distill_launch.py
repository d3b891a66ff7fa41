"""KD and DKPP: from validated tensors to launches. One launch does it; for a mean over more labelled rows than
`config.Plan.counted_below` (512 to 2048) there is one before, that counts the rows kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ban_fast.backends.interface import Divergence, LossOutput, Reduction
from ban_fast.backends.triton import config, launch, permute, rows
from ban_fast.backends.triton.distill_kernel import distill_kernel
from ban_fast.backends.triton.totals import count_kernel

_REDUCTIONS = {"none": rows.UNREDUCED.value, "sum": rows.SUM.value, "mean": rows.MEAN.value}


class Objective(NamedTuple):
    """What is asked for, as the interface has it."""

    temperature: float
    kd_weight: float
    label_weight: float
    divergence: Divergence
    scale_t2: bool
    ignore_index: int
    reduction: Reduction


def distillation(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [M, C]
    labels: Tensor | None,  # [R]
    teacher_rows: Tensor | None,  # [R]
    objective: Objective,
    permutation: permute.Permutation | None,
    need_grad: bool,
) -> LossOutput:
    """KD, or with a permutation DKPP. See `interface.Backend.kd`."""
    shape = (student.shape[0],) if objective.reduction == "none" else ()
    output = launch.empty_output(student, shape, need_grad)
    if student.shape[0] == 0:
        return output.of_no_rows()
    with launch.on(student.device):
        _launch(student, teacher, labels, teacher_rows, objective, permutation, output)
    return output


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    teacher_rows: Tensor | None,
    objective: Objective,
    permutation: permute.Permutation | None,
    output: LossOutput,
) -> None:
    o, device = objective, student.device
    labels = launch.dense(labels)
    num_rows, num_classes = student.shape
    torch_acc, acc = launch.arithmetic(student)
    align, contiguous = launch.alignment(num_classes, student, teacher), launch.contiguous(student, teacher)
    aligned, double = contiguous and align >= 4, torch_acc == torch.float64
    plan = config.distill_plan(num_classes, aligned=aligned, double=double, permuted=permutation is not None)
    programs = plan.programs(num_rows, launch.multiprocessors(device))
    in_registers = permutation is None or num_classes <= config.RANKED_BELOW
    shape = (programs * plan.rows, num_classes)
    scratch = None if in_registers else torch.empty(shape, dtype=teacher.dtype, device=device)
    reduced = o.reduction != "none"
    # A loop that fetches rows early and stores a loss for each takes Triton 3.9's LLVM minutes to compile.
    if not plan.online and not (reduced and launch.shared_memory(device) >= config.PREFETCH_SHARED):
        plan = plan._replace(stages=1)
    counts = None
    if o.reduction == "mean" and labels is not None and num_rows > plan.counted_below:
        counts = count(labels, o.ignore_index, torch_acc)
    distill_kernel[(programs,)](
        student=student,
        teacher=teacher,
        labels=labels,
        teacher_rows=launch.dense(teacher_rows),
        grad=output.grad,
        grad_scale=output.grad_scale,
        loss=output.loss,
        kd=output.kd,
        label=output.label,
        partials=torch.empty(2 * programs + 1, dtype=torch_acc, device=device) if reduced else None,
        counter=launch.counter(device) if reduced else None,
        counts=counts,
        scratch=scratch,
        num_rows=num_rows,
        num_teacher_rows=teacher.shape[0],
        num_classes=num_classes,
        num_counts=0 if counts is None else counts.numel(),
        student_row=student.stride(0),
        student_col=student.stride(1),
        teacher_row=teacher.stride(0),
        teacher_col=teacher.stride(1),
        ignore_index=o.ignore_index,
        **launch.heat(o.temperature, double),
        **launch.bits(
            double,
            kd_scale=o.temperature**2 if o.scale_t2 else 1.0,
            kd_slope=o.kd_weight * (o.temperature if o.scale_t2 else 1 / o.temperature),
            kd_weight=o.kd_weight,
            label_weight=o.label_weight,
        ),
        ACC=acc,
        ONLINE=plan.online,
        ROWS=plan.rows,
        BLOCK=plan.block,
        PARTS=plan.parts,
        STAGES=plan.stages,
        TOTAL_BLOCK=plan.total_block,
        ALIGN=align,
        CONTIGUOUS=contiguous,
        REDUCTION=_REDUCTIONS[o.reduction],
        ENTROPY=o.divergence == "ce",
        WITH_KD=o.kd_weight != 0,
        WITH_LABEL=o.label_weight != 0 and labels is not None,
        T_KIND=launch.heat_kind(o.temperature),
        SHORT=launch.half_bits(student, teacher),
        **permute.arguments(permutation, num_classes, programs * plan.rows, device, tables=not in_registers),
        **plan.options(double=double),
        **launch.OPTIONS,
    )


def count(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """[programs] partial counts of the rows kept."""
    block = 1024
    programs = min(config.TOTAL_PROGRAMS, -(-labels.shape[0] // block))
    counts = torch.empty(programs, dtype=dtype, device=labels.device)
    count_kernel[(programs,)](
        labels=labels,
        counts=counts,
        num_rows=labels.shape[0],
        ignore_index=ignore_index,
        TOTAL_BLOCK=block,
        **launch.OPTIONS,
    )
    return counts
