"""Each objective is its formula of the paper (eqs. 2, 5-11), in value and gradient, and moves the student alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ban_fast.config import ObjectiveConfig
from ban_fast.data import Batch
from ban_fast.losses import dkpp_targets
from ban_fast.training.objectives import make_objective, needs_teacher
from ban_fast.training.teacher import Taught

ROWS, CLASSES = 6, 5
SEED, STEP = 11, 3


def draw(seed: int) -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([0, 4, 2, 1, 1, 3])
BATCH = Batch(torch.empty(0), LABELS, torch.arange(100, 100 + ROWS), torch.zeros(ROWS, dtype=torch.int64))


def label_term(z: Tensor, t: Tensor, c: ObjectiveConfig) -> Tensor:
    return -z.log_softmax(1)[range(ROWS), LABELS].mean()


def kd_term(z: Tensor, t: Tensor, c: ObjectiveConfig) -> Tensor:
    p, q = (t / c.temperature).softmax(1), (z / c.temperature).softmax(1)
    return c.temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def dkpp_term(z: Tensor, t: Tensor, c: ObjectiveConfig) -> Tensor:
    """Against the targets that `dkpp_targets` gives; that those are right is the losses' own test."""
    p = dkpp_targets(t, temperature=c.temperature, seed=SEED, step=STEP, sample_ids=BATCH.sample_ids).double()
    q = (z / c.temperature).softmax(1)
    return c.temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def cwtm_term(z: Tensor, t: Tensor, c: ObjectiveConfig) -> Tensor:
    confidence = t.softmax(1).max(1).values
    return ((confidence / confidence.sum()) * -z.log_softmax(1)[range(ROWS), LABELS]).sum()


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"name": "label"}, label_term),
        ({"name": "ban"}, kd_term),
        ({"name": "ban", "temperature": 3.5, "kd_weight": 0.7}, lambda *a: 0.7 * kd_term(*a)),
        ({"name": "ban+l"}, lambda *a: kd_term(*a) + label_term(*a)),
        (
            {"name": "ban+l", "temperature": 4.0, "kd_weight": 0.9, "label_weight": 0.1},
            lambda *a: 0.9 * kd_term(*a) + 0.1 * label_term(*a),
        ),
        ({"name": "cwtm"}, cwtm_term),
        ({"name": "dkpp"}, dkpp_term),
        ({"name": "dkpp", "temperature": 2.0, "label_weight": 0.5}, lambda *a: dkpp_term(*a) + 0.5 * label_term(*a)),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_objective_is_its_formula(settings: dict[str, Any], formula: Any) -> None:
    config = ObjectiveConfig(**settings)
    student, teacher = draw(1).requires_grad_(), draw(2)
    terms = make_objective(config, SEED)(student, Taught(teacher), BATCH, torch.tensor(STEP))
    (gradient,) = torch.autograd.grad(terms.loss, student)
    exact = student.detach().double().requires_grad_()
    expected = formula(exact, teacher.double(), config)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    # fp32 of a handful of terms: some ulp of 6e-8, and the losses' own tests hold them to 2e-6
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - expected_gradient).norm() <= 2e-6 * expected_gradient.norm()
    assert not terms.kd.requires_grad
    assert not terms.label.requires_grad


@pytest.mark.parametrize("name", ["ban", "ban+l", "cwtm", "dkpp"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = draw(1).requires_grad_(), draw(2).requires_grad_()
    terms = make_objective(ObjectiveConfig(name=name), SEED)(student, Taught(teacher), BATCH, torch.tensor(0))
    terms.loss.backward()
    assert student.grad is not None
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_terms_are_reported_before_their_weights() -> None:
    config = ObjectiveConfig(name="ban+l", temperature=2.0, kd_weight=0.3, label_weight=0.2)
    student, teacher = draw(1), draw(2)
    terms = make_objective(config, SEED)(student, Taught(teacher), BATCH, torch.tensor(0))
    assert terms.kd.item() == pytest.approx(kd_term(student.double(), teacher.double(), config).item(), rel=1e-6)
    assert terms.label.item() == pytest.approx(label_term(student.double(), teacher, config).item(), rel=1e-6)
    assert terms.loss.item() == pytest.approx(0.3 * terms.kd.item() + 0.2 * terms.label.item(), rel=1e-6)
    alone = make_objective(ObjectiveConfig(name="ban"), SEED)(student, Taught(teacher), BATCH, torch.tensor(0))
    assert alone.label.item() == pytest.approx(terms.label.item(), rel=1e-6), "the label term is seen, not trained on"


def test_dkpp_draws_anew_each_step_and_by_sample() -> None:
    objective = make_objective(ObjectiveConfig(name="dkpp"), SEED)
    student, teacher = draw(1), draw(2)
    first, again, later = (objective(student, Taught(teacher), BATCH, torch.tensor(s)).loss.item() for s in (0, 0, 1))
    assert first == again
    assert first != later
    shifted = BATCH._replace(sample_ids=BATCH.sample_ids + 1)
    assert objective(student, Taught(teacher), shifted, torch.tensor(0)).loss.item() != first
    assert (
        make_objective(ObjectiveConfig(name="dkpp"), SEED + 1)(student, Taught(teacher), BATCH, torch.tensor(0)).loss
        != first
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_label_loss_is_computed_in_full_precision(dtype: torch.dtype) -> None:
    logits = (draw(1) * 4).to(dtype)
    terms = make_objective(ObjectiveConfig(name="label"), SEED)(logits, None, BATCH, torch.tensor(0))
    assert terms.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = label_term(logits.double(), logits, ObjectiveConfig())
    assert math.isclose(terms.loss.item(), expected.item(), rel_tol=1e-6)
    assert terms.kd.item() == 0


def test_labels_alone_need_no_teacher() -> None:
    assert [needs_teacher(name) for name in ("label", "ban", "ban+l", "cwtm", "dkpp")] == [
        False,
        True,
        True,
        True,
        True,
    ]
