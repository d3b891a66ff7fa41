"""What KDLoss promises besides accuracy: layouts, dtypes, ignored rows, extremes, the graph behind it."""

import itertools

import losses_truth as truth
import pytest
import torch
from torch import Tensor

from ban_fast.losses import KDLoss, kd_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BOTH = {"temperature": 3.5, "kd_weight": 0.7, "label_weight": 0.3}


def loss_and_gradient(student: Tensor, *inputs: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = kd_loss(student, *inputs, **options)
    return loss.detach(), truth.gradient(loss, student, torch.ones_like(loss))


def test_strided_inputs_are_read_where_they_lie(backend: str) -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 10), torch.randn(6, 10), torch.randint(10, (6,))
    expected = loss_and_gradient(student, teacher, labels, backend=backend, **BOTH)
    wide = torch.randn(12, 30)

    def strided(values: Tensor, layout: str) -> Tensor:
        if layout == "columns":
            place = wide.clone()[:6, 5:15]
        elif layout == "rows":
            place = wide.clone()[::2, :10]
        elif layout == "transposed":
            place = torch.empty(10, 6).t()
        else:
            place = torch.empty(6, 20)[:, ::2]
        return place.copy_(values)

    for layouts in itertools.product(["columns", "rows", "transposed", "steps"], repeat=2):
        s, t = strided(student, layouts[0]), strided(teacher, layouts[1])
        before = s.clone(), t.clone()
        result = loss_and_gradient(s, t, labels.repeat_interleave(3)[::3], backend=backend, **BOTH)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)  # sums may be in another order
        assert result[1].is_contiguous()
        assert torch.equal(s, before[0])
        assert torch.equal(t, before[1])


def test_expanded_inputs(backend: str) -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(1, 7).expand(5, 7), torch.randn(1, 7).expand(5, 7)
    labels = torch.tensor(3).expand(5)
    result = loss_and_gradient(student, teacher, labels, backend=backend, **BOTH)
    expected = loss_and_gradient(student.contiguous(), teacher.contiguous(), labels, backend=backend, **BOTH)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_leading_dimensions_are_rows(backend: str, lead: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(2)
    student, teacher, labels = torch.randn(*lead, 5), torch.randn(*lead, 5), torch.randint(5, lead)
    loss, grad = loss_and_gradient(student, teacher, labels, reduction=reduction, backend=backend, **BOTH)
    rows = loss_and_gradient(
        student.view(-1, 5), teacher.view(-1, 5), labels.view(-1), reduction=reduction, backend=backend, **BOTH
    )
    assert loss.shape == (lead if reduction == "none" else ())
    assert torch.equal(loss.flatten(), rows[0].flatten())
    assert torch.equal(grad, rows[1].view(*lead, 5))
    sequence = student.transpose(0, -2) if len(lead) > 1 else student  # leading strides that no view can merge
    other = teacher.transpose(0, -2) if len(lead) > 1 else teacher
    swapped = kd_loss(sequence, other, reduction="sum", backend=backend)
    torch.testing.assert_close(swapped, kd_loss(student, teacher, reduction="sum", backend=backend))


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("student_dtype", DTYPES)
def test_student_and_teacher_of_any_dtypes(
    backend: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(9, 33).to(student_dtype), torch.randn(9, 33).to(teacher_dtype)
    loss, grad = loss_and_gradient(student, teacher, temperature=2.0, backend=backend)
    acc = torch.float64 if student_dtype == torch.float64 else torch.float32
    assert loss.dtype == acc
    assert grad.dtype == student_dtype
    exact_student = student.to(acc)
    expected = loss_and_gradient(exact_student, teacher.to(acc), temperature=2.0, backend=backend)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected[1].to(student_dtype), rtol=torch.finfo(student_dtype).eps, atol=1e-7)


def test_ignored_rows_count_nowhere(backend: str) -> None:
    """Whatever stands in them: a mutant that reads one, divides by all, or ignores only the label term fails here."""
    torch.manual_seed(4)
    student, teacher, labels = torch.randn(8, 6), torch.randn(8, 6), torch.randint(6, (8,))
    rows = torch.arange(8)
    ignored = torch.tensor([1, 2, 7])
    kept = torch.tensor([0, 3, 4, 5, 6])
    labels[ignored] = -100
    for poison in (0.0, 1e4, torch.inf, torch.nan):
        student[ignored] = teacher[ignored] = poison
        rows[ignored] = 10**12
        for label_weight, reduction in itertools.product((0.0, 0.3), ("mean", "sum", "none")):
            options = {"label_weight": label_weight, "reduction": reduction, "temperature": 2.0, "backend": backend}
            loss, grad = loss_and_gradient(student, teacher, labels, teacher_rows=rows, **options)
            expected = loss_and_gradient(student[kept], teacher[kept], labels[kept], **options)
            torch.testing.assert_close(grad[kept], expected[1], rtol=1e-6, atol=1e-9)
            assert not grad[ignored].any()
            torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected[0], rtol=1e-6, atol=0)
            if reduction == "none":
                assert not loss[ignored].any()


def test_ignore_index_may_be_a_class(backend: str) -> None:
    torch.manual_seed(5)
    student, teacher, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 4
    result = loss_and_gradient(student, teacher, labels, ignore_index=3, backend=backend, **BOTH)
    kept = labels != 3
    expected = loss_and_gradient(student[kept], teacher[kept], labels[kept], backend=backend, **BOTH)
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(result[1][kept], expected[1])
    assert not result[1][~kept].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_learn_from_is_zero_with_a_graph(backend: str, reduction: str, dtype: torch.dtype) -> None:
    ignored = torch.full((3,), -100)
    cases = [
        (torch.randn(3, 5), ignored),
        (torch.randn(0, 5), torch.empty(0, dtype=torch.int64)),
        (torch.randn(2, 0, 5), torch.empty(2, 0, dtype=torch.int64)),
        (torch.randn(0, 5), None),
    ]
    for student, labels in cases:
        student = student.to(dtype).requires_grad_()
        loss = KDLoss(2.0, label_weight=0.0 if labels is None else 0.5, reduction=reduction, backend=backend)(
            student, torch.randn_like(student), labels
        )
        assert loss.requires_grad
        assert not loss.detach().any()
        assert loss.shape == (student.shape[:-1] if reduction == "none" else ())
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.shape == student.shape
        assert not student.grad.any()


def test_one_class_is_certain(backend: str) -> None:
    loss, grad = loss_and_gradient(torch.randn(4, 1), torch.randn(4, 1), torch.zeros(4).long(), backend=backend, **BOTH)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5, 20.0])
def test_logits_of_ten_thousand(backend: str, temperature: float) -> None:
    torch.manual_seed(6)
    teacher, labels = torch.randn(12, 10), torch.randint(10, (12,))
    student = torch.randn(12, 10)
    student[:4, 2], student[4:8, 3], teacher[2:6, 5], teacher[6:10, 2] = 1e4, -1e4, 1e4, -1e4
    student = student.requires_grad_()
    options = {"temperature": temperature, "label_weight": 0.5}
    loss = kd_loss(student, teacher, labels, backend=backend, **options)
    expected = truth.kd(student, teacher, labels, **options)
    assert truth.relative_error(loss, expected) < 1e-5  # what log-sum-exp reaches
    assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-5


def test_near_rows_with_a_far_improbable_class_are_not_negative(backend: str) -> None:
    """The log-sum-exp path where the KL is nearly 0, and a difference of logs is as often negative."""
    torch.manual_seed(7)
    teacher = torch.randn(200, 10)
    teacher[:, 4] -= 60
    student = teacher + 1e-4 * torch.randn_like(teacher)
    student[:, 4] += 30
    rows = kd_loss(student, teacher, reduction="none", backend=backend)
    assert (rows >= 0).all()
    assert (rows < 1e-6).all()
    textbook = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    assert (textbook < 0).any()


@pytest.mark.parametrize("far", [False, True])
def test_probabilities_too_small_for_their_digits_are_not_negative(backend: str, far: bool) -> None:
    """Where p is a denormal of a few bits, q - p - p log(q / p) is made of roundings."""
    small = torch.linspace(-104, -86, 4000)
    teacher = torch.stack([torch.zeros(4000), small, torch.full((4000,), -150.0)], dim=1)
    for change in (-0.3, 0.2, 0.5):
        student = teacher + torch.tensor([0.0, change, 40.0 if far else 0.0])
        assert (kd_loss(student, teacher, reduction="none", backend=backend) >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("others", [-1.0, -10.0], ids=["near", "far"])
def test_classes_masked_by_the_lowest_number(backend: str, temperature: float, others: float) -> None:
    """Not by -inf: where the teacher's probability is 0, its distance to the student's is 1e38 and counts nothing."""
    student, teacher = torch.full((3, 40), others), torch.zeros(3, 40)
    student[:, 0] = 0
    student[:, 5:9], teacher[:, 5:9] = torch.finfo(torch.float32).min, torch.tensor([[-1e4], [-1e9], [-1e30]])
    student.requires_grad_()
    rows = kd_loss(student, teacher, temperature=temperature, reduction="none", backend=backend)
    expected = truth.kd_rows(student.double(), teacher.double(), temperature) * temperature**2
    assert truth.relative_error(rows, expected) < 1e-5
    of_loss, of_truth = (truth.gradient(value, student, torch.ones_like(value)) for value in (rows, expected))
    assert truth.relative_error(of_loss, of_truth) < 1e-5


def masked(*which: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(8)
    student, teacher = torch.randn(6, 8), torch.randn(6, 8)
    for row, name in enumerate(which):
        if name in ("both", "student"):
            student[row, 3:5] = -torch.inf
        if name in ("both", "teacher"):
            teacher[row, 3:5] = -torch.inf
    return student, teacher


@pytest.mark.parametrize("divergence", ["kl", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_minus_infinity_in_both_or_in_the_teacher_alone(backend: str, temperature: float, divergence: str) -> None:
    student, teacher = masked("both", "teacher", "both", "none", "teacher", "both")
    student.requires_grad_()
    options = {"temperature": temperature, "divergence": divergence}
    loss = kd_loss(student, teacher, backend=backend, **options)
    expected = truth.kd(student, teacher, **options)
    assert truth.relative_error(loss, expected) < 1e-5
    expected_grad = truth.gradient(expected, student).nan_to_num(0)  # autograd has 0 * inf at both-dead classes
    assert truth.relative_error(truth.gradient(loss, student), expected_grad) < 1e-5


def test_classes_masked_in_both_count_nothing(backend: str) -> None:
    """As if they were not there, and with the near form's accuracy."""
    torch.manual_seed(9)
    teacher = 2 * torch.randn(20, 30)
    student = teacher + 0.7 + 1e-3 * torch.randn_like(teacher)
    student[:, 10:14] = teacher[:, 10:14] = -torch.inf
    alive = torch.ones(30, dtype=torch.bool)
    alive[10:14] = False
    student.requires_grad_()
    loss = kd_loss(student, teacher, temperature=3.5, backend=backend)
    grad = truth.gradient(loss, student)
    fewer = student.detach()[:, alive].requires_grad_()
    expected = truth.kd(fewer, teacher[:, alive], temperature=3.5)
    assert truth.relative_error(loss, expected) < 1e-4
    assert truth.relative_error(grad[:, alive], truth.gradient(expected, fewer)) < 2e-6
    assert not grad[:, ~alive].any()


def test_minus_infinity_in_the_student_alone_is_an_infinite_loss_with_a_gradient(backend: str) -> None:
    student, teacher = masked("student", "none", "none", "none", "none", "none")
    student.requires_grad_()
    rows = kd_loss(student, teacher, reduction="none", backend=backend)
    assert rows[0] == torch.inf
    assert rows[1:].isfinite().all()
    expected = (student.double().softmax(1) - teacher.double().softmax(1)).detach()
    assert truth.relative_error(truth.gradient(rows, student, torch.ones(6)), expected) < 1e-5


def test_infinite_terms_without_weight_are_left_out(backend: str) -> None:
    student, teacher = masked("student", "none", "none", "none", "none", "none")
    labels = torch.tensor([0, 1, 2, 5, 6, 7])
    result = loss_and_gradient(student, teacher, labels, kd_weight=0.0, label_weight=1.0, backend=backend)
    assert result[0].isfinite()
    labels[0] = 3
    result = loss_and_gradient(student[:1], student[:1], labels[:1], label_weight=0.0, backend=backend)
    assert result[0] == 0
    assert not result[1].any()


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_not_swallowed(backend: str, where: str, value: float) -> None:
    for column in range(5):
        student, teacher = torch.randn(3, 5), torch.randn(3, 5)
        (student if where == "student" else teacher)[1, column] = value
        rows = kd_loss(student, teacher, reduction="none", backend=backend)
        assert rows[1].isnan()
        assert rows[[0, 2]].isfinite().all()
        assert kd_loss(student, teacher, backend=backend).isnan()


def test_teacher_rows_read_the_cache_as_a_gather_would(backend: str) -> None:
    torch.manual_seed(10)
    for dtype in DTYPES:
        student, cache = torch.randn(4, 3, 11).to(dtype), torch.randn(50, 11, dtype=torch.float32)
        rows, labels = torch.randint(50, (4, 3)), torch.randint(11, (4, 3))
        result = loss_and_gradient(student, cache, labels, teacher_rows=rows, backend=backend, **BOTH)
        expected = loss_and_gradient(student, cache[rows], labels, backend=backend, **BOTH)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_return_terms(backend: str, reduction: str) -> None:
    torch.manual_seed(11)
    student, teacher, labels = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6), torch.randint(6, (2, 4))
    labels[0, 1] = -100
    options = {"temperature": 3.5, "reduction": reduction, "backend": backend}
    loss, terms = kd_loss(student, teacher, labels, kd_weight=0.7, label_weight=0.3, return_terms=True, **options)
    assert loss.requires_grad
    assert terms.keys() == {"kd", "label"}
    assert all(not term.requires_grad and term.shape == loss.shape for term in terms.values())
    torch.testing.assert_close(loss.detach(), 0.7 * terms["kd"] + 0.3 * terms["label"])
    rows, row_terms = (student.view(-1, 6), teacher.view(-1, 6), labels.view(-1)), {}
    row_terms["kd"] = truth.kd(*rows, temperature=3.5, reduction=reduction)
    row_terms["label"] = truth.kd(*rows, kd_weight=0.0, label_weight=1.0, reduction=reduction)
    for name, expected in row_terms.items():
        torch.testing.assert_close(terms[name].double().flatten(), expected.detach().flatten(), rtol=1e-6, atol=0)

    _, terms = kd_loss(student, teacher, labels, return_terms=True, **options)
    assert terms["label"].sum() > 0  # shown, though without weight
    loss, terms = kd_loss(student, teacher, return_terms=True, **options)
    assert not terms["label"].any()
    assert terms["label"].shape == loss.shape


def test_many_rows(backend: str) -> None:
    """More rows than any grid of threads; a mean of fp32 terms that a running fp32 sum would lose digits of."""
    torch.manual_seed(12)
    student, teacher = torch.randn(70001, 3, requires_grad=True), torch.randn(70001, 3)
    loss, expected = kd_loss(student, teacher, backend=backend), truth.kd(student, teacher)
    assert truth.relative_error(loss, expected) < 1e-6
    assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 2e-6


def test_the_coldest_and_the_hottest_temperatures(backend: str) -> None:
    """Where T^2 and its inverse are just inside fp32. Hot: T^2 KL is half the variance of z - t, its gradient z - t
    centred, over C. Cold: one-hot outputs, and T (q - p)."""
    torch.manual_seed(13)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    hot, hot_grad = loss_and_gradient(student, teacher, temperature=1e18, reduction="sum", backend=backend)
    centred = student - teacher - (student - teacher).mean(1, keepdim=True)
    torch.testing.assert_close(hot, (centred**2).mean(1).sum() / 2)
    torch.testing.assert_close(hot_grad, centred / 6)
    cold, cold_grad = loss_and_gradient(student, teacher, temperature=1e-18, reduction="sum", backend=backend)
    one_hot = [torch.nn.functional.one_hot(logits.argmax(1), 6) for logits in (student, teacher)]
    gap = student.amax(1) - student.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(cold * 1e18, gap.sum())
    torch.testing.assert_close(cold_grad * 1e18, (one_hot[0] - one_hot[1]).float())
