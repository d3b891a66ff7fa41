"""The losses as they are usually written, in plain PyTorch: the eager peers, and what torch.compile is given.

T = 1. Each form takes (student [B, V], teacher [B, V], labels [B], confidence [B]) and returns the loss and, for DKPP,
the order [B, V] that its teacher was permuted by: the gate needs it, and argsort has written it to memory anyway.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Objective

Answer = tuple[Tensor, Tensor | None]
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Answer]


def kd_kl_div(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean"), None


def kd_soft_ce(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    return F.cross_entropy(student, teacher.softmax(1)), None


def kd_labels_kl_div(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    log_q = student.log_softmax(1)
    return F.kl_div(log_q, teacher.softmax(1), reduction="batchmean") + F.nll_loss(log_q, labels), None


def kd_labels_soft_ce(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    return F.cross_entropy(student, teacher.softmax(1)) + F.cross_entropy(student, labels), None


def cwtm_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    confidence = teacher.softmax(1).amax(1)
    return cwtm_confidence_cross_entropy(student, teacher, labels, confidence)


def cwtm_logsumexp(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    confidence = (teacher.amax(1) - teacher.logsumexp(1)).exp()
    return cwtm_confidence_logsumexp(student, teacher, labels, confidence)


def cwtm_confidence_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    return (confidence / confidence.sum() * F.cross_entropy(student, labels, reduction="none")).sum(), None


def cwtm_confidence_logsumexp(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    cross_entropy = student.logsumexp(1) - student.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (confidence / confidence.sum() * cross_entropy).sum(), None


def dkpp_kl_div(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    target, order = permuted(teacher)
    return kd_kl_div(student, target, labels, confidence)[0], order


def dkpp_soft_ce(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
    target, order = permuted(teacher)
    return kd_soft_ce(student, target, labels, confidence)[0], order


def permuted(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Every logit but the row's largest, permuted at random by one argsort; and the order.

    order[:, :-1] is a random order of the classes but the argmax, order[:, -1] the argmax: the i-th such class takes
    the value of class order[:, i].
    """
    classes = teacher.shape[1]
    kept = teacher.argmax(1, keepdim=True)
    noise = torch.rand(teacher.shape, device=teacher.device).scatter_(1, kept, 2.0)
    order = noise.argsort(1)
    others = torch.arange(classes - 1, device=teacher.device).unsqueeze(0)
    others = others + (others >= kept)
    return teacher.scatter(1, others, teacher.gather(1, order[:, :-1])), order


def sources(order: Tensor, kept: Tensor) -> Tensor:
    """[B, V] the class whose value each class takes, from `permuted`'s order; `kept` [B, 1] is the argmax."""
    others = torch.arange(order.shape[1] - 1, device=order.device).unsqueeze(0)
    others = others + (others >= kept)
    return kept.expand_as(order).scatter(1, others, order[:, :-1])


FORMS: dict[Objective, dict[str, Form]] = {
    "kd": {"kl_div": kd_kl_div, "soft-CE": kd_soft_ce},
    "kd_labels": {"kl_div": kd_labels_kl_div, "soft-CE": kd_labels_soft_ce},
    "cwtm": {"cross_entropy": cwtm_cross_entropy, "logsumexp": cwtm_logsumexp},
    "cwtm_confidence": {"cross_entropy": cwtm_confidence_cross_entropy, "logsumexp": cwtm_confidence_logsumexp},
    "dkpp": {"argsort, kl_div": dkpp_kl_div, "argsort, soft-CE": dkpp_soft_ce},
}


def in_fp32(form: Form) -> Form:
    """The form as autocast runs it on half-precision logits: in fp32 inside."""

    def upcast(student: Tensor, teacher: Tensor, labels: Tensor, confidence: Tensor) -> Answer:
        return form(student.float(), teacher.float(), labels, confidence)

    return upcast
