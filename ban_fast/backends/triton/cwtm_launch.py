"""CWTM: from validated tensors to launches. With `confidence` one launch does it; with more labelled rows than
`config.Plan.counted_below` (512 to 2048) there is one before, that adds up the confidences. From the teacher's logits it takes
two: the confidences of a batch are needed for every row's weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ban_fast.backends.interface import LossOutput, WeightBy
from ban_fast.backends.triton import config, launch
from ban_fast.backends.triton.confidence import given_confidences_kernel, teacher_confidences_kernel
from ban_fast.backends.triton.cross_entropy import cross_entropy_kernel


class _Confidences(NamedTuple):
    values: Tensor
    """[M], or [R] by row; c or log c."""
    totals: Tensor | None
    """[2, programs] partial sums; None: the loss kernel adds them up."""
    by_row: bool
    log: bool


def weighted_cross_entropy(
    student: Tensor,  # [R, C]
    teacher: Tensor | None,  # [M, C]
    labels: Tensor,  # [R]
    confidence: Tensor | None,  # [M]
    normalizer: Tensor | None,  # 0-d
    teacher_rows: Tensor | None,  # [R]
    weight_by: WeightBy,
    ignore_index: int,
    need_grad: bool,
) -> LossOutput:
    """See `interface.Backend.cwtm`."""
    output = launch.empty_output(student, (), need_grad)
    if student.shape[0] == 0:
        return output.of_no_rows()
    labels, teacher_rows, confidence = labels.contiguous(), launch.dense(teacher_rows), launch.dense(confidence)
    with launch.on(student.device):
        plan = config.cross_entropy_plan(
            student.shape[1],
            aligned=launch.contiguous(student) and launch.alignment(student.shape[1], student) >= 4,
            double=student.dtype == torch.float64,
        )
        if confidence is not None:
            large = student.shape[0] > plan.counted_below
            totals = _given(student, labels, confidence, teacher_rows, ignore_index) if large else None
            confidences = _Confidences(confidence, totals, False, False)
        else:
            assert teacher is not None
            confidences = _of_teacher(student, teacher, labels, teacher_rows, weight_by, ignore_index)
        source = confidence if confidence is not None else teacher
        assert source is not None
        _launch(student, labels, teacher_rows, source.shape[0], confidences, normalizer, ignore_index, plan, output)
    return output


def _launch(
    student: Tensor,
    labels: Tensor,
    teacher_rows: Tensor | None,
    num_teacher_rows: int,
    confidences: _Confidences,
    normalizer: Tensor | None,
    ignore_index: int,
    plan: config.Plan,
    output: LossOutput,
) -> None:
    num_rows, num_classes = student.shape
    torch_acc, acc = launch.arithmetic(student)
    programs = plan.programs(num_rows, launch.multiprocessors(student.device))
    partials = torch.empty(2 * programs + 1, dtype=torch_acc, device=student.device)
    totals = confidences.totals
    cross_entropy_kernel[(programs,)](
        student=student,
        labels=labels,
        teacher_rows=teacher_rows,
        confidence=confidences.values,
        totals=totals,
        normalizer=normalizer,
        grad=output.grad,
        grad_scale=output.grad_scale,
        loss=output.loss,
        kd=output.kd,
        label=output.label,
        partials=partials,
        counter=launch.counter(student.device),
        num_rows=num_rows,
        num_teacher_rows=num_teacher_rows,
        num_classes=num_classes,
        num_totals=0 if totals is None else totals.numel() // 2,
        student_row=student.stride(0),
        student_col=student.stride(1),
        ignore_index=ignore_index,
        ACC=acc,
        ONLINE=plan.online,
        ROWS=plan.rows,
        BLOCK=plan.block,
        PARTS=plan.parts,
        STAGES=plan.stages,
        TOTAL_BLOCK=plan.total_block,
        ALIGN=launch.alignment(num_classes, student),
        CONTIGUOUS=launch.contiguous(student),
        BY_ROW=confidences.by_row,
        LOG=confidences.log,
        **plan.options(double=torch_acc == torch.float64),
        **launch.OPTIONS,
    )


def _given(
    student: Tensor, labels: Tensor, confidence: Tensor, teacher_rows: Tensor | None, ignore_index: int
) -> Tensor:
    """[2, programs] partial sums of the batch's confidences."""
    block = 1024
    torch_acc, acc = launch.arithmetic(student)
    programs = min(config.TOTAL_PROGRAMS, -(-labels.shape[0] // block))
    totals = torch.empty(2 * programs, dtype=torch_acc, device=student.device)
    given_confidences_kernel[(programs,)](
        confidence=confidence,
        labels=labels,
        teacher_rows=teacher_rows,
        totals=totals,
        num_rows=labels.shape[0],
        num_teacher_rows=confidence.shape[0],
        num_classes=student.shape[1],
        ignore_index=ignore_index,
        TOTAL_BLOCK=block,
        ACC=acc,
        **launch.OPTIONS,
    )
    return totals


def _of_teacher(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    teacher_rows: Tensor | None,
    weight_by: WeightBy,
    ignore_index: int,
) -> _Confidences:
    """Every row's confidence in the teacher's logits, and the batch's partial sums."""
    num_rows, num_classes = student.shape
    torch_acc, acc = launch.arithmetic(student)
    plan = config.blocks_plan(num_classes)
    programs = plan.programs(num_rows, launch.multiprocessors(student.device))
    values = torch.empty(num_rows, dtype=torch_acc, device=student.device)
    totals = torch.empty(2 * programs, dtype=torch_acc, device=student.device)
    log = weight_by == "teacher_label"
    teacher_confidences_kernel[(programs,)](
        teacher=teacher,
        labels=labels,
        teacher_rows=teacher_rows,
        confidence=values,
        totals=totals,
        num_rows=num_rows,
        num_teacher_rows=teacher.shape[0],
        num_classes=num_classes,
        teacher_row=teacher.stride(0),
        teacher_col=teacher.stride(1),
        ignore_index=ignore_index,
        ROWS=plan.rows,
        BLOCK=plan.block,
        STAGES=plan.stages,
        ALIGN=launch.alignment(num_classes, teacher),
        CONTIGUOUS=launch.contiguous(teacher),
        LOG=log,
        ACC=acc,
        **plan.options(double=torch_acc == torch.float64),
        **launch.OPTIONS,
    )
    return _Confidences(values, totals, True, log)
