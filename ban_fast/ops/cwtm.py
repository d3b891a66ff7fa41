"""Confidence-weighted by teacher max (eq 10, and eq 9's weights, of Born-Again Neural Networks) as an operator."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.backends.interface import WeightBy, acc_dtype
from ban_fast.ops import checks
from ban_fast.ops.autograd import Packed, Result, evaluate, flat, flat_rows, pack, packed_fake

torch.library.define(
    "ban_fast::cwtm",
    "(Tensor student, Tensor? teacher, Tensor labels, Tensor? confidence, Tensor? normalizer, Tensor? teacher_rows, *, "
    "str weight_by, int ignore_index, bool need_grad, str backend)"
    " -> (Tensor loss, Tensor kd, Tensor label, Tensor grad, Tensor grad_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ban_fast::cwtm", "default")
def _cwtm(
    student: Tensor,  # [R, C]
    teacher: Tensor | None,  # [M, C]
    labels: Tensor,  # [R]
    confidence: Tensor | None,  # [M]
    normalizer: Tensor | None,  # 0-d
    teacher_rows: Tensor | None,  # [R]
    *,
    backend: str,
    **options: Any,
) -> Packed:
    checks.check_operands(student, teacher, labels, None, teacher_rows)
    if confidence is not None:
        checks.check_confidence(confidence, student, teacher_rows)
    if normalizer is not None:
        checks.check_normalizer(normalizer, student)
    chosen = dispatch.resolve(backend, "cwtm", student)
    return pack(chosen.cwtm(student, teacher, labels, confidence, normalizer, teacher_rows, **options))


def _cwtm_fake(student: Tensor, *inputs: Tensor | None, need_grad: bool, **options: Any) -> Packed:
    return packed_fake(student, "sum", need_grad)


torch.library.register_fake("ban_fast::cwtm", _cwtm_fake)


@overload
def cwtm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    weight_by: WeightBy = "teacher_max",
    ignore_index: int = -100,
    backend: str = "auto",
    confidence: Tensor | None = None,
    normalizer: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def cwtm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    weight_by: WeightBy = "teacher_max",
    ignore_index: int = -100,
    backend: str = "auto",
    confidence: Tensor | None = None,
    normalizer: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    return_terms: Literal[False] = False,
) -> Tensor: ...


def cwtm_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor | None,  # [..., C], or [M, C] with teacher_rows; None with confidence
    labels: Tensor,  # [...] int64
    *,
    weight_by: WeightBy = "teacher_max",
    ignore_index: int = -100,
    backend: str = "auto",
    confidence: Tensor | None = None,  # [...] fp32, or [M] with teacher_rows
    normalizer: Tensor | None = None,  # 0-d
    teacher_rows: Tensor | None = None,  # [...] int64 into M
    return_terms: bool = False,
) -> Result:
    """sum_s w_s CE(q_s, label_s), w_s = c_s / sum_u c_u: see `CWTMLoss` for every argument.

    Returns the loss, 0-d fp32 (fp64 for fp64 students). With `return_terms` also {"kd": 0, "label": the loss},
    detached.
    Raises ValueError that names the argument and the value received.
    """
    checks.check_choice("weight_by", weight_by, checks.WEIGHTS_BY)
    checks.check_int("ignore_index", ignore_index)
    checks.check_logits("student_logits", student_logits)
    if labels is None:
        raise ValueError("labels: None was given; CWTM weights the cross-entropy with the labels")
    checks.check_labels(labels, student_logits, 1.0)
    if confidence is not None:
        checks.check_confidence(confidence, student_logits, teacher_rows)
    elif teacher_logits is None:
        raise ValueError("teacher_logits: None was given without confidence")
    if teacher_logits is not None:
        checks.check_teacher(student_logits, teacher_logits, teacher_rows)
    checks.check_teacher_rows(teacher_rows, student_logits)
    if normalizer is not None:
        checks.check_normalizer(normalizer, student_logits)
        normalizer = normalizer.detach().to(acc_dtype(student_logits.dtype))
    teacher = None if teacher_logits is None or confidence is not None else flat(teacher_logits)
    return evaluate(
        "cwtm",
        student_logits,
        (teacher, flat_rows(labels), flat_rows(confidence), normalizer, flat_rows(teacher_rows)),
        backend=backend,
        return_terms=return_terms,
        weight_by=weight_by,
        ignore_index=ignore_index,
    )
