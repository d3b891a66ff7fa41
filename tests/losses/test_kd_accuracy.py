"""KDLoss against float64 autograd of the textbook formula, above all where the textbook loses fp32 entirely."""

import math

import losses_truth as truth
import pytest
import torch
from torch import Tensor

from ban_fast.losses import KDLoss, kd_loss

# With and without a tail for every vector width; CIFAR's and PTB's sizes; DKPP's change of method at 99 and 100.
CLASSES = [2, 3, 5, 7, 10, 99, 100, 101, 1000, 10000]
# Powers of two divide exactly and hide rounding; 3.5 and 20 do not.
TEMPERATURES = [0.5, 1.0, 3.5, 4.0, 20.0]
GRADIENT = 2e-6  # the promise; this form was measured within 8e-7, the textbook's is 2e-4 near the teacher
VALUE = 1e-4


def rows_for(classes: int) -> int:
    return max(3, 3000 // classes)


def near(teacher: Tensor, shift: float, noise: float) -> Tensor:
    return teacher + shift + noise * torch.randn_like(teacher)


REGIMES = {
    "random": lambda t: 2 * torch.randn_like(t),
    "noise": lambda t: near(t, 0.0, 1e-3),
    "shift-0.7": lambda t: near(t, 0.7, 0.0),
    "shift-5": lambda t: near(t, 5.0, 0.0),
    "shift-100": lambda t: near(t, 100.0, 0.0),
    "shift-0.7-noise": lambda t: near(t, 0.7, 1e-3),
    "shift-5-noise": lambda t: near(t, 5.0, 1e-3),
    "shift-100-noise": lambda t: near(t, 100.0, 1e-3),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_and_value_in_fp32(backend: str, regime: str, temperature: float) -> None:
    torch.manual_seed(0)
    for classes in CLASSES:
        teacher = 2 * torch.randn(rows_for(classes), classes)
        student = REGIMES[regime](teacher).requires_grad_()
        loss = KDLoss(temperature, backend=backend)(student, teacher)
        expected = truth.kd(student, teacher, temperature=temperature)
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < GRADIENT, (
            classes
        )
        assert loss.dtype == torch.float32
        assert loss >= 0
        if "shift" not in regime or "noise" in regime:  # float64's textbook KL of 1e-15 is noise: see below
            assert truth.relative_error(loss, expected) < VALUE, classes


@pytest.mark.parametrize("temperature", [1.0, 3.5, 20.0])
@pytest.mark.parametrize("shift", [0.7, 5.0, 100.0])
def test_value_where_only_the_rounding_of_a_shift_is_left(backend: str, shift: float, temperature: float) -> None:
    torch.manual_seed(1)
    for classes in (2, 10, 100):
        teacher = 2 * torch.randn(2, classes)
        student = teacher + shift
        loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
        expected = truth.exact_kl(student, teacher, temperature)
        assert expected > 0
        assert abs(loss.item() - expected) < VALUE * expected


def test_a_shift_without_rounding_gives_exactly_nothing(backend: str) -> None:
    torch.manual_seed(2)
    for temperature in TEMPERATURES:
        teacher = torch.randint(-64, 64, (6, 101)) / 16
        student = (teacher + 5).requires_grad_()
        loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
        assert loss == 0
        assert not truth.gradient(loss, student).any()


def test_the_textbook_would_fail_these_bounds() -> None:
    """Power: what is bounded above at 2e-6 is 1e-4 or worse by log-softmax in fp32."""
    torch.manual_seed(0)
    teacher = 2 * torch.randn(30, 100)
    student = near(teacher, 5.0, 1e-3).requires_grad_()
    naive = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    expected = truth.kd(student, teacher)
    assert truth.relative_error(truth.gradient(naive, student), truth.gradient(expected, student)) > 50 * GRADIENT
    assert truth.relative_error(naive, expected) > VALUE


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_flat_and_sharp_logits(backend: str, scale: float) -> None:
    """Peaked students of flat teachers, where 1 + A is small, and one-hot rows, where most of p underflows."""
    torch.manual_seed(3)
    for classes in CLASSES:
        for temperature in (0.5, 3.5):
            teacher = scale * torch.randn(rows_for(classes), classes)
            student = (3 * torch.randn_like(teacher)).requires_grad_()
            loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
            expected = truth.kd(student, teacher, temperature=temperature)
            assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < GRADIENT
            assert truth.relative_error(loss, expected) < 1e-5


@pytest.mark.parametrize("share", [0.03, 0.05])
def test_students_that_are_certain_of_what_their_teachers_are_not(backend: str, share: float) -> None:
    """Their class has `share` of the teacher's mass: 1 + A is about that, and A's rounding 1 / share times as large.

    Row by row: 1 + A from differences of logits is measured at 3.5e-6 to 5.7e-6, log-sum-exp within 7e-7.
    """
    torch.manual_seed(4)
    for classes in (100, 1000):
        teacher = 0.3 * torch.randn(96, classes)
        teacher[:, 0] = teacher[:, 1:].logsumexp(1) + math.log(share / (1 - share))
        student = torch.randn_like(teacher)
        student[:, 0] = student.amax(1) + 4 * torch.rand(96) + math.log(classes)
        student.requires_grad_()
        mass = teacher.softmax(1)[:, 0] / student.detach().softmax(1)[:, 0]  # 1 + A
        assert (teacher.argmax(1) == 0).all()
        assert share < mass.min() < mass.max() < 1.2 * share
        loss = kd_loss(student, teacher, backend=backend)
        expected = truth.kd(student, teacher)
        found, exact = truth.gradient(loss, student), truth.gradient(expected, student)
        for row, wanted in zip(found, exact, strict=True):
            assert truth.relative_error(row, wanted) < GRADIENT
        assert truth.relative_error(loss, expected) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5, 20.0])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("gap", [15.0, 25.0, 60.0, 90.0, -25.0, -60.0, -100.0])
def test_negligible_classes_far_off_cost_the_others_nothing(
    backend: str, gap: float, many: bool, temperature: float
) -> None:
    """A peaked teacher, a student 0.01 away, and classes negligible to both on which they differ by gap T.

    Taking the row to log-sum-exp for them would cost 1 to 7 % of the gradient. At 60 and 90 the teacher's probability
    underflows in fp32 (e^-90, e^-120), where the student's, e^-30, does not.
    """
    torch.manual_seed(0)
    for classes in (10, 100, 10000):
        teacher = torch.randn(max(4, 2000 // classes), classes)
        teacher[:, 0] += 14
        off = slice(3, 3 + classes // 4) if many else slice(7, 8)
        teacher[:, off] = -30 - max(gap, 0.0) + torch.randn_like(teacher[:, off])
        student = near(teacher, 0.0, 1e-2)
        student[:, off] = teacher[:, off] + gap
        teacher, student = teacher * temperature, (student * temperature).requires_grad_()
        loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
        expected = truth.kd(student, teacher, temperature=temperature)
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < GRADIENT
        assert truth.relative_error(loss, expected) < VALUE


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5, 20.0])
@pytest.mark.parametrize("gap", [21.0, 60.0, 90.0])
def test_a_leaping_class_of_any_mass(backend: str, gap: float, temperature: float) -> None:
    """The student's class has e^-12 to e^4 times the teacher's whole mass: across the change to log-sum-exp at 1."""
    torch.manual_seed(1)
    for classes in (10, 100, 10000):
        for mass in (-12.0, -7.0, -3.0, -0.1, 0.1, 4.0):
            teacher = torch.randn(max(4, 500 // classes), classes)
            teacher[:, 0] += 14
            student = near(teacher, 0.0, 1e-2)
            teacher[:, 7] = teacher.logsumexp(1) + mass - gap
            student[:, 7] = teacher[:, 7] + gap
            teacher, student = teacher * temperature, (student * temperature).requires_grad_()
            loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
            expected = truth.kd(student, teacher, temperature=temperature)
            assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < GRADIENT
            assert truth.relative_error(loss, expected) < VALUE


def test_student_peaked_where_a_flat_teacher_has_its_argmax(backend: str) -> None:
    """The element of reference is an outlier by 8: A is near -1, and its rounding would cost 3e-4 here."""
    torch.manual_seed(4)
    for classes in (10, 100, 1000, 10000):
        teacher = 0.1 * torch.randn(rows_for(classes), classes)
        student = teacher.scatter_add(1, teacher.argmax(1, keepdim=True), torch.full((len(teacher), 1), 8.0))
        student.requires_grad_()
        for temperature in (0.5, 1.0):
            loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
            expected = truth.kd(student, teacher, temperature=temperature)
            # 1e-5 is what log-sum-exp, which takes over here, reaches.
            assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 1e-5
            assert truth.relative_error(loss, expected) < 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("regime", ["random", "noise", "shift-5-noise"])
def test_fp64_throughout(backend: str, regime: str, temperature: float) -> None:
    torch.manual_seed(5)
    for classes in (2, 7, 100):
        teacher = 2 * torch.randn(4, classes, dtype=torch.float64)
        student = REGIMES[regime](teacher).requires_grad_()
        loss = kd_loss(student, teacher, temperature=temperature, backend=backend)
        expected = truth.kd(student, teacher, temperature=temperature)
        assert loss.dtype == torch.float64
        # float64's textbook gradient is itself known to 1e-16 / (1e-3 / 20) near the teacher, its value not at all.
        assert truth.relative_error(truth.gradient(loss, student), truth.gradient(expected, student)) < 2e-11
        exact = truth.exact_kl(student, teacher, temperature)
        assert abs(loss.item() - exact) < 1e-10 * exact


@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_label_term_where_the_label_is_nearly_certain(backend: str, temperature: float) -> None:
    """q_y = 1 - 1e-5 and closer: q - 1 by subtraction has two digits left at 1 - 1e-5, and none at 1 - 1e-9."""
    torch.manual_seed(6)
    for classes in CLASSES:
        for doubt in (1e-5, 1e-9):
            rows = rows_for(classes)
            labels = torch.randint(classes, (rows,))
            student = torch.randn(rows, classes, dtype=torch.float64)
            others = student.scatter(1, labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
            certain = others + torch.log(torch.tensor((1 - doubt) / doubt, dtype=torch.float64))
            student = student.scatter(1, labels[:, None], certain).float().requires_grad_()
            options = {"temperature": temperature, "kd_weight": 0.0, "label_weight": 1.0}
            loss = kd_loss(student, torch.zeros_like(student), labels, backend=backend, **options)
            expected, expected_gradient = truth.certain_label(student.detach(), labels)
            assert truth.relative_error(truth.gradient(loss, student), expected_gradient) < GRADIENT
            assert truth.relative_error(loss, expected) < GRADIENT


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, GRADIENT), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_cross_entropy_with_a_nearly_certain_teacher(
    backend: str, temperature: float, dtype: torch.dtype, limit: float
) -> None:
    """p_r = 1 - 1e-5 and closer: the sum of the teacher's exponentials has two digits of its logarithm left in fp32 at
    1 - 1e-5, and none at 1 - 1e-9; four in fp64 at 1 - 1e-12."""
    torch.manual_seed(8)
    for classes in CLASSES:
        for doubt in (1e-5, 1e-9, 1e-12):
            rows = rows_for(classes)
            r = torch.randint(classes, (rows, 1))
            teacher = temperature * torch.randn(rows, classes, dtype=torch.float64)
            others = temperature * (teacher / temperature).scatter(1, r, -torch.inf).logsumexp(1, keepdim=True)
            teacher = teacher.scatter(1, r, others - temperature * math.log(doubt)).to(dtype)
            student = (teacher + 1e-3 * torch.randn(rows, classes)).to(dtype)
            options = {"temperature": temperature, "divergence": "ce", "scale_t2": False}
            loss = kd_loss(student, teacher, backend=backend, **options)
            expected = truth.of_a_certain_teacher(student, teacher, temperature)
            assert truth.relative_error(loss, expected) < limit, (classes, doubt)


@pytest.mark.parametrize("divergence", ["kl", "ce"])
@pytest.mark.parametrize("scale_t2", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_together(backend: str, divergence: str, scale_t2: bool, reduction: str) -> None:
    torch.manual_seed(7)
    teacher, labels = 2 * torch.randn(17, 13), torch.randint(13, (17,))
    labels[3] = labels[11] = -100
    student = (2 * torch.randn(17, 13)).requires_grad_()
    options = {
        "temperature": 3.5,
        "kd_weight": 0.7,
        "label_weight": 0.3,
        "divergence": divergence,
        "scale_t2": scale_t2,
    }
    loss = kd_loss(student, teacher, labels, reduction=reduction, backend=backend, **options)
    expected = truth.kd(student, teacher, labels, reduction=reduction, **options)
    grad_output = torch.randn(17) if reduction == "none" else torch.tensor(-2.5)
    assert loss.shape == expected.shape
    assert truth.relative_error(loss, expected) < 1e-6
    value = truth.gradient(loss, student, grad_output)
    assert truth.relative_error(value, truth.gradient(expected, student, grad_output.double())) < GRADIENT


def test_drop_in_for_distill_kl(backend: str) -> None:
    """KDLoss(T)(y_s, y_t) is the widely copied DistillKL, at generic logits to fp32's own accuracy there."""
    torch.manual_seed(8)
    student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
    for temperature in (1.0, 4.0):
        copied = torch.nn.functional.kl_div(
            (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
        )
        loss = KDLoss(temperature, backend=backend)(student, teacher)
        torch.testing.assert_close(loss, copied * temperature**2, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            truth.gradient(loss, student), truth.gradient(copied * temperature**2, student), rtol=1e-4, atol=1e-7
        )
