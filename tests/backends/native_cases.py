"""What the native backend's tests share: KD with its defaults, and float64 truth that owes nothing to ban_fast."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from reference_truth import KD
from torch import Tensor

from ban_fast.backends import native
from ban_fast.backends.interface import LossOutput


def kd(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, teacher_rows: Tensor | None = None, **options: Any
) -> LossOutput:
    return native.kd(student, teacher, labels, teacher_rows, **{**KD, **options})


class Truth(NamedTuple):
    kd: Tensor
    """Mean over rows of T^2 KL, from u = log q - log p: float64 still has it at u = 1e-8, where sum p u cancels."""
    grad: Tensor
    """[R, C], by autograd of the textbook form."""


def truth(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    label_weight: float = 0.0,
) -> Truth:
    z = student.detach().double().requires_grad_()
    log_q = (z / temperature).log_softmax(1)
    log_p = (teacher.double() / temperature).log_softmax(1)
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
    if labels is not None:
        loss = loss + label_weight * F.cross_entropy(z, labels)
    (grad,) = torch.autograd.grad(loss, z)
    u, p = (log_q - log_p).detach(), log_p.exp()
    near = p * (u * u * (1 / 2 + u / 6 + u * u / 24))
    term = torch.where(u.abs() < 1e-3, near, log_q.detach().exp() - p - p * u)
    return Truth(term.sum(1).mean() * temperature**2, grad)


def relative_error(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).norm() / true.norm())


def final_gradient(output: LossOutput) -> Tensor:
    """The gradient at grad_output 1, in double: what is stored, times its scale."""
    assert output.grad is not None
    scale = 1.0 if output.grad_scale is None else float(output.grad_scale)
    return output.grad.double() * scale
