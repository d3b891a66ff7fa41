"""What a student learns from: each objective's name, and the loss of one batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import ObjectiveConfig
from ..data import Batch
from ..losses import cwtm_loss, dkpp_loss, kd_loss
from .teacher import Taught


class Terms(NamedTuple):
    """The loss of a batch, and its two terms before their weights, for the record."""

    loss: Tensor
    """0-d, with its graph."""
    kd: Tensor
    """0-d, detached; T^2 included, 0 where the objective has no KD term."""
    label: Tensor
    """0-d, detached."""


Objective = Callable[[Tensor, Taught | None, Batch, Tensor], Terms]
"""(student_logits [B, C], what the teacher says of the batch or None, batch, step: 0-d int64) -> Terms."""


def needs_teacher(name: str) -> bool:
    """Whether the objective reads the teacher's outputs."""
    return name != "label"


def make_objective(config: ObjectiveConfig, seed: int) -> Objective:
    """The objective of `config`; `seed` keys DKPP's permutations, beside step and sample id."""
    kd_weight, label_weight = config.weights()
    temperature = config.temperature

    def label(student: Tensor, taught: Taught | None, batch: Batch, step: Tensor) -> Terms:
        loss = F.cross_entropy(student if student.dtype == torch.float64 else student.float(), batch.labels)
        return Terms(loss, torch.zeros_like(loss), loss.detach())

    def ban(student: Tensor, taught: Taught | None, batch: Batch, step: Tensor) -> Terms:
        assert taught is not None
        loss, terms = kd_loss(
            student,
            _logits(taught),
            batch.labels,
            teacher_rows=taught.rows,
            temperature=temperature,
            kd_weight=kd_weight,
            label_weight=label_weight,
            return_terms=True,
        )
        return Terms(loss, terms["kd"], terms["label"])

    def cwtm(student: Tensor, taught: Taught | None, batch: Batch, step: Tensor) -> Terms:
        assert taught is not None
        loss, terms = cwtm_loss(
            student,
            taught.logits if taught.confidence is None else None,
            batch.labels,
            confidence=taught.confidence,
            normalizer=taught.total,
            teacher_rows=taught.rows,
            return_terms=True,
        )
        return Terms(loss, terms["kd"], terms["label"])

    def dkpp(student: Tensor, taught: Taught | None, batch: Batch, step: Tensor) -> Terms:
        assert taught is not None
        loss, terms = dkpp_loss(
            student,
            _logits(taught),
            batch.labels,
            teacher_rows=taught.rows,
            temperature=temperature,
            seed=seed,
            kd_weight=kd_weight,
            label_weight=label_weight,
            step=step,
            sample_ids=batch.sample_ids,
            return_terms=True,
        )
        return Terms(loss, terms["kd"], terms["label"])

    return {"label": label, "ban": ban, "ban+l": ban, "cwtm": cwtm, "dkpp": dkpp}[config.name]


def _logits(taught: Taught) -> Tensor:
    assert taught.logits is not None, "a cache of confidences teaches CWTM alone"
    return taught.logits
