"""DKPPLoss and dkpp_targets: what is permuted, what is kept, and what the permutation depends on."""

import dkpp_truth
import losses_truth as truth
import pytest
import torch
from torch import Tensor

from ban_fast.losses import DKPPLoss, dkpp_loss, dkpp_targets, kd_loss

CLASSES = [2, 3, 5, 7, 10, 98, 99, 100, 101, 1000, 10000]


def case(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (2 * torch.randn(rows, classes)).to(dtype).requires_grad_(), (2 * torch.randn(rows, classes)).to(dtype)


def permuted(teacher: Tensor, seed: int, step: int, ids: list[int]) -> Tensor:
    """The teacher's logits as the definition permutes them."""
    classes = teacher.shape[1]
    argmax = teacher.float().argmax(1).tolist()
    return torch.stack(
        [
            row[dkpp_truth.sources(kept, classes, seed, step, sample_id)]
            for row, kept, sample_id in zip(teacher, argmax, ids, strict=True)
        ]
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5, 20.0])
def test_loss_gradient_and_targets(backend: str, temperature: float) -> None:
    for classes in CLASSES:
        rows = 3 if classes > 1000 else 8
        student, teacher = case(rows, classes)
        ids = torch.arange(rows) * 1000 - 3
        expected_teacher = permuted(teacher, 11, 5, ids.tolist())
        options = {"seed": 11, "step": 5, "sample_ids": ids, "temperature": temperature, "backend": backend}
        loss = dkpp_loss(student, teacher, **options)
        expected = truth.kd(student, expected_teacher, temperature=temperature)
        assert truth.relative_error(loss, expected) < 1e-5
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 2e-6
        targets = dkpp_targets(teacher, **options)
        expected_targets = (expected_teacher.double() / temperature).softmax(1)
        assert targets.dtype == torch.float32
        assert truth.relative_error(targets, expected_targets) < 1e-6


def test_near_the_permuted_teacher_the_gradient_keeps_its_digits(backend: str) -> None:
    for classes in (5, 100, 1000):
        _, teacher = case(8, classes)
        expected_teacher = permuted(teacher, 0, 0, list(range(8)))
        student = (expected_teacher + 0.7 + 1e-3 * torch.randn_like(teacher)).requires_grad_()
        loss = dkpp_loss(student, teacher, temperature=3.5, backend=backend)
        expected = truth.kd(student, expected_teacher, temperature=3.5)
        assert truth.relative_error(loss, expected) < 1e-4
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 2e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_options_are_those_of_kd(backend: str, reduction: str, divergence: str) -> None:
    student, teacher = case(9, 6)
    labels = torch.arange(9) % 6
    labels[4] = -100
    options = {"temperature": 2.0, "kd_weight": 0.7, "label_weight": 0.3}
    options |= {"divergence": divergence, "reduction": reduction}
    loss = DKPPLoss(seed=3, scale_t2=False, backend=backend, **options)(student, teacher, labels)
    expected_teacher = permuted(teacher, 3, 0, list(range(9)))
    expected = truth.kd(student, expected_teacher, labels, scale_t2=False, **options)
    assert truth.relative_error(loss, expected) < 1e-6
    grad = truth.gradient(loss.sum(), student)
    assert truth.relative_error(grad, truth.gradient(expected.sum(), student)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_multiset_and_argmax_are_kept(backend: str, dtype: torch.dtype) -> None:
    for classes in (2, 3, 10, 100, 1000):
        _, teacher = case(20, classes, dtype)
        targets = dkpp_targets(teacher, seed=1, backend=backend)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        probabilities = teacher.to(acc).softmax(1)
        assert targets.dtype == acc
        torch.testing.assert_close(targets.sort(1).values, probabilities.sort(1).values)
        kept = teacher.float().argmax(1, keepdim=True)
        torch.testing.assert_close(targets.gather(1, kept), probabilities.gather(1, kept))
        if classes > 3:
            assert not torch.allclose(targets, probabilities)


def test_targets_of_very_many_equal_logits(backend: str) -> None:
    """As in test_cwtm: a plain fp32 sum of 16,130 terms that round alike is 8e-6 out."""
    torch.manual_seed(1)
    teacher = torch.randn(4, 16130).round()
    expected = permuted(teacher, 0, 0, [0, 1, 2, 3]).double().softmax(1)
    assert truth.relative_error(dkpp_targets(teacher, backend=backend), expected) < 1e-6


def test_ties_keep_the_lowest_index(backend: str) -> None:
    teacher = torch.zeros(50, 6)
    teacher[:, 2] = teacher[:, 4] = 5.0
    teacher[:, 5] = -3.0
    targets = dkpp_targets(teacher, backend=backend)
    top = targets[:, 2]
    assert torch.equal(top, targets.amax(1))
    places = (targets == top[:, None]).sum(0)
    assert places[2] == 50
    assert places[4] < 50  # the other one moves
    close = torch.zeros(50, 6, dtype=torch.float64)
    close[:, 2], close[:, 4] = 1.0, 1.0 + 1e-12  # one fp32 number: the lower index is kept, for fp64 teachers too
    targets = dkpp_targets(close, backend=backend)
    assert ((targets[:, 2] / close.softmax(1)[:, 2] - 1).abs() < 1e-13).all()


def test_two_classes_are_kd(backend: str) -> None:
    student, teacher = case(30, 2)
    loss = dkpp_loss(student, teacher, temperature=3.5, seed=9, step=4, backend=backend)
    expected = kd_loss(student, teacher, temperature=3.5, backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(truth.gradient(loss, student), truth.gradient(expected, student))


@pytest.mark.parametrize("classes", [5, 100])
def test_a_row_depends_on_seed_step_and_sample_alone(backend: str, classes: int) -> None:
    student, teacher = case(12, classes)
    ids = torch.randint(-(2**62), 2**62, (12,))
    options = {"seed": 5, "step": 8, "reduction": "none", "backend": backend}
    rows = dkpp_loss(student, teacher, sample_ids=ids, **options)
    assert torch.equal(rows, dkpp_loss(student, teacher, sample_ids=ids, **options))
    order = torch.randperm(12)
    shuffled = dkpp_loss(student[order], teacher[order], sample_ids=ids[order], **options)
    assert torch.equal(shuffled, rows[order])
    parts = [dkpp_loss(student[p], teacher[p], sample_ids=ids[p], **options) for p in order.split([1, 4, 7])]
    assert torch.equal(torch.cat(parts), rows[order])
    assert torch.equal(dkpp_loss(student, teacher, sample_ids=ids, **{**options, "step": torch.tensor(8)}), rows)
    for change in ({"seed": 6}, {"step": 9}, {"sample_ids": ids + 1}):
        other = dkpp_loss(student, teacher, **{"sample_ids": ids, **options, **change})
        assert (other != rows).sum() > 8  # of 12; a row of 5 classes is the same by chance in 1 of 24


def test_sample_ids_default_to_the_row_numbers(backend: str) -> None:
    _, teacher = case(12, 10)
    expected = dkpp_targets(teacher, sample_ids=torch.arange(12), backend=backend)
    assert torch.equal(dkpp_targets(teacher, backend=backend), expected)
    nested = dkpp_targets(teacher.view(3, 4, 10), backend=backend)
    assert torch.equal(nested, expected.view(3, 4, 10))
    assert torch.equal(dkpp_targets(teacher.t().contiguous().t(), backend=backend), expected)


def test_teacher_rows_read_the_cache_as_a_gather_would(backend: str) -> None:
    student, _ = case(12, 10)
    cache, rows = torch.randn(40, 10), torch.randint(40, (12,))
    labels = torch.randint(10, (12,))
    labels[1], rows[1] = -100, 40
    loss = dkpp_loss(student, cache, labels, teacher_rows=rows, seed=2, backend=backend)
    gathered = cache[rows.clamp_max(39)]
    assert torch.equal(loss, dkpp_loss(student, gathered, labels, seed=2, backend=backend))
    rows[1] = 0
    targets = dkpp_targets(cache, teacher_rows=rows.view(3, 4), seed=2, backend=backend)
    assert targets.shape == (3, 4, 10)
    assert torch.equal(targets.view(12, 10), dkpp_targets(cache[rows], seed=2, backend=backend))


def test_ignored_empty_and_terms(backend: str) -> None:
    student, teacher = case(4, 5)
    for s, labels in ((student, torch.full((4,), -100)), (student[:0], torch.empty(0, dtype=torch.int64))):
        loss = dkpp_loss(s, teacher[: len(s)], labels, label_weight=1.0, backend=backend)
        assert loss == 0
        assert not truth.gradient(loss, student).any()
    labels = torch.arange(4)
    loss, terms = dkpp_loss(student, teacher, labels, label_weight=0.5, return_terms=True, backend=backend)
    torch.testing.assert_close(loss.detach(), terms["kd"] + 0.5 * terms["label"])
    assert dkpp_targets(torch.empty(0, 5), backend=backend).shape == (0, 5)


def test_minus_infinity_moves_with_its_output(backend: str) -> None:
    student, teacher = case(8, 6)
    teacher[:, 1] = -torch.inf
    expected_teacher = permuted(teacher, 0, 0, list(range(8)))
    loss = dkpp_loss(student, teacher, backend=backend)
    expected = truth.kd(student, expected_teacher)
    assert truth.relative_error(loss, expected) < 1e-5
    assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-5
    targets = dkpp_targets(teacher, backend=backend)
    assert torch.equal(targets == 0, expected_teacher == -torch.inf)


def test_targets_carry_no_graph(backend: str) -> None:
    teacher = torch.randn(3, 5, requires_grad=True)
    assert not dkpp_targets(teacher, backend=backend).requires_grad
