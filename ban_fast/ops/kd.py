"""Knowledge distillation (eq 2, 5 and 7 of Born-Again Neural Networks, at any temperature) as an operator."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.backends.interface import Divergence, Reduction
from ban_fast.ops import checks
from ban_fast.ops.autograd import Packed, Result, evaluate, flat, flat_rows, pack, packed_fake, usual

torch.library.define(
    "ban_fast::kd",
    "(Tensor student, Tensor teacher, Tensor? labels, Tensor? teacher_rows, *, float temperature, float kd_weight, "
    "float label_weight, str divergence, bool scale_t2, int ignore_index, str reduction, bool need_grad, str backend)"
    " -> (Tensor loss, Tensor kd, Tensor label, Tensor grad, Tensor grad_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ban_fast::kd", "default")
def _kd(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [M, C]
    labels: Tensor | None,  # [R]
    teacher_rows: Tensor | None,  # [R]
    *,
    backend: str,
    **options: Any,
) -> Packed:
    checks.check_operands(student, teacher, labels, None, teacher_rows)
    return pack(dispatch.resolve(backend, "kd", student).kd(student, teacher, labels, teacher_rows, **options))


def _kd_fake(student: Tensor, *inputs: Tensor | None, reduction: str, need_grad: bool, **options: Any) -> Packed:
    return packed_fake(student, reduction, need_grad)


torch.library.register_fake("ban_fast::kd", _kd_fake)


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    teacher_rows: Tensor | None = None,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    teacher_rows: Tensor | None = None,
    return_terms: Literal[False] = False,
) -> Tensor: ...


def kd_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor,  # [..., C], or [M, C] with teacher_rows
    labels: Tensor | None = None,  # [...] int64
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    teacher_rows: Tensor | None = None,  # [...] int64 into M
    return_terms: bool = False,
) -> Result:
    """kd_weight * T^2 * KL(p_T || q_T) + label_weight * CE(q, labels): see `KDLoss` for every argument.

    Returns the loss, fp32 (fp64 for fp64 students): 0-d, or [...] for reduction "none". With `return_terms` also
    {"kd": ..., "label": ...}: the terms reduced as the loss is, before their weights, T^2 included, detached; "label"
    is 0 where no labels are given.
    Raises ValueError that names the argument and the value received.
    """
    if not return_terms:
        loss = usual(
            student_logits,
            teacher_logits,
            labels,
            teacher_rows,
            backend,
            temperature,
            kd_weight,
            label_weight,
            divergence,
            scale_t2,
            ignore_index,
            reduction,
        )
        if loss is not None:
            return loss
    checks.check_kd_options(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
    checks.check_logits("student_logits", student_logits)
    checks.check_teacher(student_logits, teacher_logits, teacher_rows)
    checks.check_labels(labels, student_logits, label_weight)
    return evaluate(
        "kd",
        student_logits,
        (flat(teacher_logits), flat_rows(labels), flat_rows(teacher_rows)),
        backend=backend,
        return_terms=return_terms,
        temperature=temperature,
        kd_weight=kd_weight,
        label_weight=label_weight,
        divergence=divergence,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        reduction=reduction,
    )
