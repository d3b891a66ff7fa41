"""CWTMLoss: eq 10 and eq 9 against float64 autograd, and the scope of its normaliser."""

import warnings

import losses_truth as truth
import pytest
import torch
from torch import Tensor

from ban_fast.losses import CWTMLoss, cwtm_loss

WEIGHTS_BY = ["teacher_max", "teacher_label"]


def case(rows: int = 12, classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(rows, classes), 2 * torch.randn(rows, classes)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


@pytest.mark.parametrize("weight_by", WEIGHTS_BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient(backend: str, weight_by: str, dtype: torch.dtype) -> None:
    for classes in (2, 3, 5, 7, 10, 99, 100, 101, 1000, 10000):
        student, teacher, labels = case(9, classes)
        student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
        labels[4] = -100
        loss = CWTMLoss(weight_by=weight_by, backend=backend)(student, teacher, labels)
        expected = truth.cwtm(student, teacher, labels, weight_by=weight_by)
        bound = 1e-12 if dtype == torch.float64 else 2e-6
        assert loss.dtype == dtype
        assert truth.relative_error(loss, expected) < bound
        grad = truth.gradient(loss, student, torch.tensor(-2.5, dtype=dtype))
        assert truth.relative_error(grad, -2.5 * truth.gradient(expected, student)) < bound
        assert not grad[4].any()


@pytest.mark.parametrize("weight_by", WEIGHTS_BY)
def test_confidence_over_very_many_classes(backend: str, weight_by: str) -> None:
    """torch's softmax adds fp32 terms one by one: equal ones round the same way each time, 5e-6 at 16,130 classes."""
    for seed in range(3):
        torch.manual_seed(seed)
        student, teacher = torch.randn(16, 16130, requires_grad=True), torch.randn(16, 16130).round()
        labels = torch.randint(16130, (16,))
        loss = cwtm_loss(student, teacher, labels, weight_by=weight_by, backend=backend)
        expected = truth.cwtm(student, teacher, labels, weight_by=weight_by)
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-6


def test_no_graph_and_no_warning_where_confidence_and_normalizer_have_one(backend: str) -> None:
    student, _, labels = case()
    confidence, normalizer = torch.rand(12, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cwtm_loss(student, None, labels, confidence=confidence, normalizer=normalizer, backend=backend).backward()
    assert confidence.grad is None
    assert normalizer.grad is None
    assert student.grad is not None


def test_equal_confidence_is_the_plain_mean(backend: str) -> None:
    student, _, labels = case()
    loss = cwtm_loss(student, torch.zeros_like(student), labels, backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels))


def test_one_row_has_weight_one(backend: str) -> None:
    student, teacher, labels = case(1)
    loss = cwtm_loss(student, teacher, labels, backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, labels))


def test_eq_9_where_every_probability_underflows(backend: str) -> None:
    """p_label near 1e-65 and less in every row: exp then sum gives 0 / 0 in fp32, log-softmax does not."""
    student, teacher, labels = case(6)
    for row, gap in enumerate((150.0, 151.0, 149.5, 400.0, 150.5, 152.0)):
        teacher[row, labels[row]] = teacher[row].max() - gap
    assert not teacher.softmax(1).gather(1, labels[:, None]).any()
    loss = cwtm_loss(student, teacher, labels, weight_by="teacher_label", backend=backend)
    expected = truth.cwtm(student, teacher, labels, weight_by="teacher_label")
    # fp32 holds a log-probability of -150 to 8e-6, and so the weights
    assert truth.relative_error(loss, expected) < 1e-4
    assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-4


@pytest.mark.parametrize("weight_by", WEIGHTS_BY)
def test_micro_batches_with_the_whole_batch_normalizer(backend: str, weight_by: str) -> None:
    """Eq 10: the normaliser is the batch's. Parts that share it add up; parts with their own do not."""
    student, teacher, labels = case()
    labels[2] = labels[9] = -100
    whole = cwtm_loss(student, teacher, labels, weight_by=weight_by, backend=backend)
    grad = truth.gradient(whole, student)
    kept = labels != -100
    p = teacher.softmax(1)
    confidence = p.amax(1) if weight_by == "teacher_max" else p.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    normalizer = confidence[kept].sum()
    parts = [slice(0, 5), slice(5, 6), slice(6, 12)]

    def summed(**options) -> Tensor:
        return sum(
            cwtm_loss(student[part], teacher[part], labels[part], weight_by=weight_by, backend=backend, **options)
            for part in parts
        )

    shared = summed(normalizer=normalizer)
    torch.testing.assert_close(shared, whole, rtol=2e-6, atol=0)
    torch.testing.assert_close(truth.gradient(shared, student), grad, rtol=1e-5, atol=1e-7)
    assert abs(summed() / len(parts) - whole) > 0.01
    double = cwtm_loss(student, teacher, labels, weight_by=weight_by, normalizer=normalizer.double(), backend=backend)
    torch.testing.assert_close(double, whole)


def test_confidence_known_already(backend: str) -> None:
    student, teacher, labels = case()
    labels[5] = -100
    confidence = teacher.softmax(1).amax(1)
    expected = cwtm_loss(student, teacher, labels, backend=backend)
    grad = truth.gradient(expected, student)
    loss = cwtm_loss(student, None, labels, confidence=confidence, backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(truth.gradient(loss, student), grad)
    both = cwtm_loss(student, torch.full_like(teacher, torch.nan), labels, confidence=confidence, backend=backend)
    assert torch.equal(both, loss)
    scaled = cwtm_loss(student, None, labels, confidence=7 * confidence, backend=backend)
    torch.testing.assert_close(scaled, expected)  # weights are ratios


def test_teacher_rows_select_logits_or_confidence(backend: str) -> None:
    student, _, labels = case()
    cache = torch.randn(40, 10)
    rows = torch.randint(40, (12,))
    for weight_by in WEIGHTS_BY:
        loss = cwtm_loss(student, cache, labels, weight_by=weight_by, teacher_rows=rows, backend=backend)
        gathered = cwtm_loss(student, cache[rows], labels, weight_by=weight_by, backend=backend)
        assert torch.equal(loss, gathered)
    confidence = torch.rand(40)
    loss = cwtm_loss(student, None, labels, confidence=confidence, teacher_rows=rows, backend=backend)
    assert torch.equal(loss, cwtm_loss(student, None, labels, confidence=confidence[rows], backend=backend))
    strided = torch.rand(80)[::2]
    loss = cwtm_loss(student, None, labels, confidence=strided, teacher_rows=rows, backend=backend)
    assert torch.equal(loss, cwtm_loss(student, None, labels, confidence=strided[rows], backend=backend))


def test_leading_dimensions_and_strides(backend: str) -> None:
    student, teacher, labels = case()
    expected = cwtm_loss(student, teacher, labels, backend=backend)
    student3, teacher3 = student.detach().view(3, 4, 10).requires_grad_(), teacher.view(3, 4, 10)
    loss = cwtm_loss(student3, teacher3, labels.view(3, 4), backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(truth.gradient(loss, student3).view(12, 10), truth.gradient(expected, student))
    confidence = teacher.softmax(1).amax(1).view(3, 4)
    loss = cwtm_loss(student3, None, labels.view(3, 4), confidence=confidence, backend=backend)
    torch.testing.assert_close(loss, expected)
    transposed = student.detach().t().contiguous().t()
    torch.testing.assert_close(cwtm_loss(transposed, teacher.flip(1).flip(1), labels, backend=backend), expected)


def test_ignored_rows_are_not_in_the_normaliser(backend: str) -> None:
    student, teacher, labels = case()
    ignored = torch.tensor([0, 4, 11])
    kept = torch.tensor([i for i in range(12) if i not in (0, 4, 11)])
    labels[ignored] = -100
    for weight_by in WEIGHTS_BY:
        expected = cwtm_loss(student[kept], teacher[kept], labels[kept], weight_by=weight_by, backend=backend)
        poisoned, bad_teacher = student.detach().clone(), teacher.clone()
        poisoned[ignored] = bad_teacher[ignored] = torch.nan
        poisoned.requires_grad_()
        loss = cwtm_loss(poisoned, bad_teacher, labels, weight_by=weight_by, backend=backend)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        grad = truth.gradient(loss, poisoned)
        torch.testing.assert_close(grad, truth.gradient(expected, student), rtol=1e-6, atol=1e-9)
        assert not grad[ignored].any()


@pytest.mark.parametrize("weight_by", WEIGHTS_BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalizer", [None, 0.0, 2.0])
def test_nothing_to_learn_from_is_zero_with_a_graph(
    backend: str, weight_by: str, dtype: torch.dtype, normalizer: float | None
) -> None:
    options = {"weight_by": weight_by, "backend": backend}
    options["normalizer"] = None if normalizer is None else torch.tensor(normalizer)
    for rows in (0, 3):
        student = torch.randn(rows, 5, dtype=dtype, requires_grad=True)
        loss = cwtm_loss(student, torch.randn(rows, 5), torch.full((rows,), -100), **options)
        assert loss == 0
        assert loss.requires_grad
        assert not truth.gradient(loss, student).any()


def test_extreme_logits(backend: str) -> None:
    student, teacher, labels = case(8)
    with torch.no_grad():
        student[0, 3], student[1, labels[1]], student[2, labels[2]] = 1e4, 1e4, -1e4
    teacher[3, 2], teacher[4, 2], teacher[5, 1] = 1e4, -1e4, -torch.inf
    labels[5] = 0
    for weight_by in WEIGHTS_BY:
        loss = cwtm_loss(student, teacher, labels, weight_by=weight_by, backend=backend)
        expected = truth.cwtm(student, teacher, labels, weight_by=weight_by)
        assert truth.relative_error(loss, expected) < 1e-5
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-5


def test_nan_is_not_swallowed(backend: str) -> None:
    """Whichever of its bits are set, as in memory that nobody wrote."""
    for column, bits in zip(range(10), 5 * (0x7FC00000, -1, 0x7FC00001, 0x7F8001FF, -0x3FFE01), strict=False):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert nan.isnan()
        student, teacher, labels = case(4)
        teacher[1, column] = nan
        for weight_by in WEIGHTS_BY:
            assert cwtm_loss(student, teacher, labels, weight_by=weight_by, backend=backend).isnan()
        with torch.no_grad():
            student[1, column] = nan
        assert cwtm_loss(student, torch.zeros(4, 10), labels, backend=backend).isnan()


@pytest.mark.parametrize("classes", [10, 300, 1003])
def test_a_teacher_without_a_softmax_is_not_swallowed(backend: str, classes: int) -> None:
    """In long rows too, whose blocks are taken again where a far larger logit comes: before, beside and after it."""
    for values, columns in (
        (torch.nan, (0, classes // 2, 3 * classes // 4 - 1, classes - 1)),
        (torch.inf, (0, classes // 2, classes - 1)),
        (-torch.inf, (slice(None),)),
    ):
        for column in columns:
            student, teacher, labels = case(4, classes)
            teacher[1, 3 * classes // 4] = 100.0
            teacher[1, column] = values
            for weight_by in WEIGHTS_BY:
                assert cwtm_loss(student, teacher, labels, weight_by=weight_by, backend=backend).isnan()


@pytest.mark.parametrize("weight_by", WEIGHTS_BY)
@pytest.mark.parametrize("classes", [2, 10, 300, 5000])
def test_weights_are_the_confidences(backend: str, classes: int, weight_by: str) -> None:
    """Over teachers from flat to sure, with their largest logit early or late, and classes that are ruled out."""
    generator = torch.Generator().manual_seed(classes)
    sharpness = torch.logspace(-2, 1.6, 64).view(-1, 1)
    teacher = (torch.randn(64, classes, generator=generator).double() * sharpness).float()
    teacher[::2] = teacher[::2].sort(dim=1).values
    teacher[::5, 0] = -torch.inf
    labels = teacher.argmax(1).flip(0) if weight_by == "teacher_max" else teacher.argmax(1)
    student = torch.zeros(64, classes, requires_grad=True)
    cwtm_loss(student, teacher, labels, weight_by=weight_by, normalizer=torch.tensor(1.0), backend=backend).backward()
    # The student is indifferent: every class but the label gets the row's weight / classes.
    at_label = student.grad.gather(1, labels[:, None])[:, 0]
    weights = -at_label.double() * classes / (classes - 1)
    expected = teacher.double().softmax(1).amax(1)
    # fp32: the gradient is rounded (6e-8), and the teacher's sum has terms with as much each and their logits' own.
    torch.testing.assert_close(weights, expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("classes", [300, 5000])
def test_rows_whose_largest_logit_comes_last(backend: str, classes: int) -> None:
    """Element by element: a difference to a logit far below the largest would be rounded by up to 1e-6."""
    generator = torch.Generator().manual_seed(classes)
    student = torch.randn(64, classes, generator=generator).double() * torch.logspace(-2, 1.6, 64).view(-1, 1)
    student = student.float().sort(dim=1).values.requires_grad_()
    labels = torch.randint(classes, (64,), generator=generator)
    cwtm_loss(student, torch.zeros(64, classes), labels, normalizer=torch.tensor(1.0), backend=backend).backward()
    expected = student.detach().double().softmax(1)
    expected.scatter_add_(1, labels[:, None], -torch.ones(64, 1, dtype=torch.float64))
    counts = expected.abs() > 1e-3
    torch.testing.assert_close(student.grad.double()[counts] * classes, expected[counts], rtol=8e-7, atol=0)


def test_terms(backend: str) -> None:
    student, teacher, labels = case()
    loss, terms = cwtm_loss(student, teacher, labels, return_terms=True, backend=backend)
    assert terms["kd"] == 0
    assert torch.equal(terms["label"], loss.detach())
    assert not terms["label"].requires_grad


def test_an_infinite_term_without_weight_is_left_out(backend: str) -> None:
    student, _, labels = case(4)
    with torch.no_grad():
        student[1, labels[1]] = -torch.inf
    confidence = torch.tensor([0.5, 0.0, 1.0, 0.25])
    loss = cwtm_loss(student, None, labels, confidence=confidence, backend=backend)
    kept = [0, 2, 3]
    torch.testing.assert_close(
        loss, cwtm_loss(student[kept], None, labels[kept], confidence=confidence[kept], backend=backend)
    )
    assert not truth.gradient(loss, student)[1].any()


@pytest.mark.parametrize("jump", [-float("inf"), 3.0, 19.0, 21.0, 100.0])
def test_rows_whose_beginning_says_little_of_them(backend: str, jump: float) -> None:
    """Long rows are read once, relative to the largest of their first 256 classes: here a later one is larger."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        student, teacher = torch.randn(2, 6, 1003, dtype=dtype)
        for logits in (student, teacher):
            if jump < 0:
                logits[:, :300] = jump
            else:
                logits[:, 700] += jump
        labels = torch.tensor([700, 700, 999, 320, 1002, 500])
        student.requires_grad_()
        loss = cwtm_loss(student, teacher, labels, backend=backend)
        expected = truth.cwtm(student, teacher, labels)
        assert truth.relative_error(loss, expected) < 1e-6
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 2e-6
