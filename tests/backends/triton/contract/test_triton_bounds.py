"""What a row may hold, and what may not be read: every tensor lies inside a buffer of NaN, or of other indices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_truth import KD, truth
from torch import Tensor
from triton_truth import CWTM, DKPP, assert_close, logits

from ban_fast.backends import triton
from ban_fast.backends.interface import LossOutput

INF, NAN = float("inf"), float("nan")
SLOW = pytest.mark.slow
CLASSES = [10, 129, *(pytest.param(n, marks=SLOW) for n in (2, 17, 100, 1500, 11000))]
"""A plan each: many rows a program or one, a warp and more, several parts, online; permuted in registers, or not."""
LOSSES = ["kd", "dkpp", "cwtm", "cwtm, confidence given"]


def surrounded(tensor: Tensor, device: torch.device, before: int = 64) -> Tensor:
    """The tensor at the same place of a buffer that no result survives reading from."""
    if tensor.dtype.is_floating_point:
        buffer = torch.full((before + tensor.numel() + 4096,), NAN, dtype=tensor.dtype, device=device)
    else:
        buffer = torch.full((before + tensor.numel() + 4096,), 3, dtype=tensor.dtype, device=device)
    inside = buffer[before : before + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def call(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    rows: Tensor | None,
    *,
    by_reference: bool = False,
) -> LossOutput:
    """One loss, reduction "none" where there is one, by Triton or the truth."""
    compute = truth if by_reference else lambda name, *tensors, **options: getattr(triton, name)(*tensors, **options)
    weight = {"label_weight": 0.5 if labels is not None else 0.0, "reduction": "none", "temperature": 3.0}
    if loss == "kd":
        return compute("kd", student, teacher, labels, rows, **KD | weight)  # type: ignore[no-any-return]
    if loss == "dkpp":
        step = torch.tensor(5, device=student.device)
        return compute("dkpp", student, teacher, labels, None, step, rows, **DKPP | weight)  # type: ignore[no-any-return]
    options = CWTM | {"weight_by": "teacher_max"}
    if loss == "cwtm":
        return compute("cwtm", student, teacher, labels, None, None, rows, **options)  # type: ignore[no-any-return]
    confidence = surrounded(teacher.softmax(1).amax(1).float(), student.device)
    return compute("cwtm", student, None, labels, confidence, None, rows, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_beside_the_tensors_is_read(loss: str, classes: int, device: torch.device) -> None:
    student, teacher = logits(5, classes, "random")
    labels, rows = torch.tensor([0, -100, 1, classes - 1, 0]), torch.tensor([4, 0, 0, 3, 4])
    wanted = call(loss, student, teacher, labels, rows, by_reference=True)
    for before in (64, 63):  # aligned, and not
        tensors = [surrounded(x, device, before) for x in (student, teacher, labels, rows)]
        got = call(loss, *tensors)
        assert_close(on_cpu(got), wanted)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_index_out_of_range_is_nan_without_a_gradient_in_its_row_alone(
    loss: str, classes: int, device: torch.device
) -> None:
    student, teacher = logits(7, classes, "random")
    labels = torch.tensor([0, classes, 1, -1, -100, 2**40, 0])
    rows = torch.tensor([6, 0, 7, -1, 99, -(2**40), 2])
    for given_labels, given_rows in ((labels, None), (labels.clamp(0, classes - 1), rows), (labels, rows)):
        wrong = (given_labels < 0) | (given_labels >= classes)
        if given_rows is not None:
            wrong = wrong | (given_rows < 0) | (given_rows >= 7)
        wrong &= given_labels != -100
        tensors = [None if x is None else surrounded(x, device) for x in (student, teacher, given_labels, given_rows)]
        got = on_cpu(call(loss, *tensors))  # type: ignore[arg-type]
        assert got.grad is not None
        bad = wrong | (given_labels == -100)
        assert not got.grad[bad].any()
        sound_labels = given_labels.where(~wrong, -100)
        sound_rows = None if given_rows is None else given_rows.where(~bad, 0)
        wanted = call(loss, student, teacher, sound_labels, sound_rows, by_reference=True)
        assert wanted.grad is not None
        if loss.startswith("cwtm"):
            assert got.loss.isnan()
            assert got.label.isnan()
        else:
            assert torch.equal(got.loss.isnan(), wrong)
            assert torch.equal(got.kd.isnan(), wrong)
            assert torch.equal(got.label.isnan(), wrong)
            got = got._replace(**{name: getattr(got, name).where(~wrong, 0) for name in ("loss", "kd", "label")})
            assert_close(got, wanted)
        assert_close(got._replace(loss=wanted.loss, kd=wanted.kd, label=wanted.label), wanted)


@pytest.mark.parametrize("loss", ["kd", "dkpp"])
def test_a_mean_with_a_row_out_of_range_is_nan_and_counts_it(loss: str, device: torch.device) -> None:
    student, teacher = logits(4, 10, "random")
    options = (DKPP if loss == "dkpp" else KD) | {"label_weight": 1.0}
    labels = torch.tensor([1, 10, -100, 2])
    key: tuple[Any, ...] = (None, 0) if loss == "dkpp" else ()
    on_device = [x.to(device) for x in (student, teacher, labels)]
    got = on_cpu(getattr(triton, loss)(*on_device, *key, None, **options))
    assert got.loss.isnan()
    ids = (torch.tensor([0, 3]),) if loss == "dkpp" else ()
    wanted = truth(loss, student[[0, 3]], teacher[[0, 3]], labels[[0, 3]], *ids, *key[1:], None, **options)
    torch.testing.assert_close(got.grad[[0, 3]].double(), wanted.grad * 2 / 3, rtol=1e-5, atol=1e-9)  # of 3, not 2


@pytest.mark.parametrize("classes", [5, 129, 11000, *(pytest.param(n, marks=SLOW) for n in (40, 1500))])
def test_logits_that_are_minus_infinity(classes: int, device: torch.device) -> None:
    """In both, in the teacher's alone, in the student's alone (an infinite KL), at the label, and in all of a row."""
    student, teacher = logits(7, classes, "near")
    student[0, 1::2] = teacher[0, 1::2] = -INF
    teacher[1, 2] = -INF
    student[2, 1] = -INF
    student[3, 4] = -INF
    student[4] = -INF
    teacher[5] = -INF
    labels = torch.tensor([0, 2, 3, 4, 0, 0, 1])
    with_none = call("kd", student, teacher, labels, None, by_reference=True)
    got = on_cpu(call("kd", student.to(device), teacher.to(device), labels.to(device), None))
    for row in range(7):
        one, wanted = _row(got, row), _row(with_none, row)
        if row in (4, 5):
            assert one.kd.isnan() or one.kd.isinf()
            assert wanted.kd.isnan() or wanted.kd.isinf()
        else:
            assert_close(one, wanted, loss=1e-5, gradient=1e-5)  # by log-sum-exp


@pytest.mark.parametrize("classes", [5, 129, 11000])
def test_classes_masked_by_the_lowest_number(classes: int, device: torch.device) -> None:
    """Their logits are 1e38 apart, and the teacher's probability is 0."""
    for regime in ("near", "random"):
        student, teacher = logits(3, classes, regime)
        student[:, 1:4], teacher[:, 1:4] = torch.finfo(torch.float32).min, torch.tensor([-1e4, -1e9, -1e30])
        wanted = call("kd", student, teacher, None, None, by_reference=True)
        got = on_cpu(call("kd", student.to(device), teacher.to(device), None, None))
        assert_close(got, wanted, loss=1e-4, gradient=1e-5)


@pytest.mark.parametrize("classes", [5, 129, 11000])
def test_a_certain_class_where_log_sum_exp_serves(classes: int, device: torch.device) -> None:
    """q - p of a class that has all but 1e-7 of both is what the others lack: in fp32 the difference is nothing."""
    student, teacher = logits(2, classes, "random")
    for x in (student, teacher):
        x -= 75
        x[:, 0] = 1
    teacher[:, 1] = -INF  # alone: the centred form does not hold
    wanted = call("kd", student, teacher, None, None, by_reference=True)
    assert (wanted.grad[:, 0].abs() < 1e-5).all()  # type: ignore[index]
    got = on_cpu(call("kd", student.to(device), teacher.to(device), None, None))
    torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-16)  # type: ignore[union-attr]


@pytest.mark.parametrize("classes", [2, 129, 11000, *(pytest.param(n, marks=SLOW) for n in (10, 100, 1500))])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_very_large_logits(size: float, classes: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(classes)
    signs = [torch.randn(4, classes, generator=generator).sign() for _ in range(2)]
    student, teacher = size * signs[0], size * signs[1]
    teacher[1] = student[1]
    student[2] = teacher[2] + 1e-3 * torch.randn(classes, generator=generator)
    student[3], teacher[3] = student[3] - 1e4, teacher[3] + 1e4  # apart by a constant
    labels = torch.tensor([0, 1, 0, 1])
    wanted = call("kd", student, teacher, labels, None, by_reference=True)
    got = on_cpu(call("kd", student.to(device), teacher.to(device), labels.to(device), None))
    assert_close(got, wanted, loss=1e-5, gradient=1e-5)
    assert got.kd[1] == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [10, 1500, *(pytest.param(n, marks=SLOW) for n in (100, 11000))])
def test_nan_stays_in_its_row_and_is_never_lost(loss: str, classes: int, device: torch.device) -> None:
    """What `max` does with NaN differs between the interpreter and a GPU: a loss must not depend on it."""
    student, teacher = logits(5, classes, "random")
    student[0, classes // 2] = NAN
    student[3] = NAN  # ignored
    if loss in ("kd", "dkpp"):
        teacher[1, classes // 3] = NAN
    labels = torch.tensor([0, 1, 0, -100, 1])
    got = on_cpu(call(loss, student.to(device), teacher.to(device), labels.to(device), None))
    assert got.grad is not None
    if loss in ("kd", "dkpp"):
        assert got.loss.isnan().tolist() == [True, True, False, False, False]
        assert not got.grad[[2, 4]].isnan().any()
        assert got.grad[[0, 1]].isnan().any(1).all()
    else:
        assert got.loss.isnan()
        assert not got.grad[[1, 2, 4]].isnan().any()
    assert not got.grad[3].any()


def test_a_teacher_without_rows_is_never_read(device: torch.device) -> None:
    student, _ = logits(3, 10, "random")
    rows = torch.zeros(3, dtype=torch.int64, device=device)
    teacher = surrounded(torch.empty(0, 10), device)
    got = on_cpu(call("kd", student.to(device), teacher, None, rows))
    assert got.loss.isnan().all()
    assert not got.grad.any()  # type: ignore[union-attr]


def on_cpu(output: LossOutput) -> LossOutput:
    return LossOutput(*(None if x is None else x.cpu() for x in output))  # type: ignore[arg-type]


def _row(output: LossOutput, row: int) -> LossOutput:
    return LossOutput(*(None if x is None or x.dim() == 0 else x[row : row + 1] for x in output))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("classes", "dimension"), [(10, 0), (10, 1), pytest.param(20_000, 0, marks=SLOW)])
def test_strides_of_more_elements_than_32_bits_count(
    loss: str,
    classes: int,
    dimension: int,
    device: torch.device,
    far_apart: Callable[[Tensor, int], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU's memory has no pages that wait to be touched")
    copy = torch.UntypedStorage.copy_

    def copied(to: torch.UntypedStorage, source: torch.UntypedStorage, *options: Any) -> torch.UntypedStorage:
        """The interpreter brings every storage back to where it came from: on the CPU to itself, page by page."""
        return to if to.data_ptr() == source.data_ptr() else copy(to, source, *options)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copied)
    student, teacher = (matrix.half() for matrix in logits(3, classes, "random"))
    labels, rows = torch.tensor([0, 4, 9]), torch.tensor([2, 0, 1])
    wanted = call(loss, student, teacher, labels, rows)
    for z, t in ((far_apart(student, dimension), teacher), (student, far_apart(teacher, dimension))):
        got = call(loss, z, t, labels, rows)
        assert torch.equal(got.loss, wanted.loss)
        assert got.grad is not None
        assert wanted.grad is not None
        assert torch.equal(got.grad, wanted.grad)
