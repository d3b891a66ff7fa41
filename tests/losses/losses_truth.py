"""Textbook formulas in float64, by autograd: what the losses are held against. Nothing here comes from ban_fast."""

import decimal
from decimal import Decimal

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_rows(student: Tensor, teacher: Tensor, temperature: float, divergence: str = "kl") -> Tensor:
    """[R] KL(p_T || q_T), or the cross-entropy of p_T with q_T."""
    log_q = F.log_softmax(student.double() / temperature, dim=1)
    log_p = F.log_softmax(teacher.double() / temperature, dim=1)
    p = log_p.exp()
    gap = -log_q if divergence == "ce" else log_p - log_q
    return (p * gap.masked_fill(p == 0, 0)).sum(1)


def kd(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [R, C]
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: str = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * KL + label_weight * CE, reduced."""
    rows = kd_weight * kd_rows(student, teacher, temperature, divergence) * (temperature**2 if scale_t2 else 1)
    kept = torch.ones(len(student), dtype=torch.bool) if labels is None else labels != ignore_index
    if label_weight and labels is not None:
        rows = rows + label_weight * F.cross_entropy(
            student.double(), labels, ignore_index=ignore_index, reduction="none"
        )
    if reduction == "none":
        return torch.where(kept, rows, 0.0)
    rows = rows[kept]
    return rows.sum() if reduction == "sum" else rows.sum() / max(len(rows), 1)


def of_a_certain_teacher(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of p_T with q_T in float64, measured from the teacher's largest class r: log1p(R) of the
    student's, and for the others p_i (z_r - z_i) / T more. A sum over log q would lose what 1 - p_r = 1e-12 is."""
    r = teacher.argmax(1, keepdim=True)
    z, t = ((x - x.gather(1, r)).double() / temperature for x in (student.double(), teacher.double()))
    others = t.exp().scatter(1, r, 0)
    p = others / (1 + others.sum(1, keepdim=True))
    return (z.exp().scatter(1, r, 0).sum(1).log1p() - (p * z).sum(1)).mean()


def certain_label(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and its gradient from R, the sum of exp(z_i - z_y) over i != y: at q_y = 1 - 1e-9 autograd's
    log-softmax over 10,000 classes is off by 1e-6 even in float64, more or less as it adds them up."""
    z, at = student.double(), labels[:, None]
    odds = (z - z.gather(1, at)).exp().scatter(1, at, 0.0)
    total = odds.sum(1, keepdim=True)
    gradient = odds.scatter(1, at, -total) / (1 + total)
    return total.log1p().mean(), gradient / len(student)


def cwtm(
    student: Tensor, teacher: Tensor, labels: Tensor, *, weight_by: str = "teacher_max", ignore_index: int = -100
) -> Tensor:
    """sum_s w_s CE_s, eq 10 or eq 9."""
    kept = labels != ignore_index
    student, teacher, labels = student[kept].double(), teacher[kept].double(), labels[kept]
    if weight_by == "teacher_max":
        confidence = teacher.softmax(1).amax(1)
        weight = confidence / confidence.sum()
    else:
        weight = teacher.log_softmax(1).gather(1, labels[:, None]).squeeze(1).softmax(0)
    return (weight * F.cross_entropy(student, labels, reduction="none")).sum()


def gradient(loss: Tensor, student: Tensor, grad_output: Tensor | None = None) -> Tensor:
    """d loss / d student."""
    return torch.autograd.grad(loss, student, grad_output)[0]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||."""
    truth = truth.double()
    return float(((value.double() - truth).norm() / truth.norm()).detach())


def exact_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Mean over rows of T^2 KL(p_T || q_T) in 60 digits: where the two agree to 1e-8, float64 has none left."""
    with decimal.localcontext(decimal.Context(prec=60)):
        t = Decimal(temperature)
        total = Decimal(0)
        for z_row, t_row in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
            q = [(Decimal(z) / t).exp() for z in z_row]
            p = [(Decimal(z) / t).exp() for z in t_row]
            q_sum, p_sum = sum(q), sum(p)
            total += sum(x / p_sum * ((x / p_sum).ln() - (y / q_sum).ln()) for x, y in zip(p, q, strict=True))
        return float(total * t * t / len(student))
