"""DKPP and CWTM of the native backend: every form that the permutation has there, against its plain definition."""

import math
from typing import Any

import dkpp_truth
import pytest
import torch
from native_cases import kd, relative_error
from reference_truth import KD
from torch import Tensor

from ban_fast.backends import native

# Both ends of every form that the kernel has: identity, swap-or-not (n <= 98), Feistel in bytes with tables of up to 64
# entries (n <= 4096), 128 (halves up to 127: n <= 16,129) and 256 (n <= 65,025), with and without points to walk past,
# and in words.
CLASS_COUNTS = [1, 2, 3, 4, 16, 17, 33, 98, 99, 100, 101, 129, 998, 1000, 1001, 4097, 4098, 10_000]
CLASS_COUNTS += [16_130, 16_131, 32_000, 65_026, 65_027]


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_permutation_is_its_definition(classes: int) -> None:
    rows = 1 if classes > 20_000 else 3 if classes > 1000 else 21  # beyond one block of 16 rows' keys
    seed, step = -(2**40) - 3, 2**33 + 5
    argmax = torch.tensor([(0, classes - 1, classes // 2)[i % 3] for i in range(rows)])
    ids = torch.tensor([i * 0x1_0000_0001 - 7 for i in range(rows)])
    result = native.dkpp_permutation(argmax, ids, step, seed=seed, num_classes=classes)
    for row in range(rows):
        assert result[row].tolist() == dkpp_truth.sources(int(argmax[row]), classes, seed, step, int(ids[row]))


def test_row_numbers_stand_for_ids_and_a_tensor_for_the_step() -> None:
    argmax = torch.arange(20) % 12
    plain = native.dkpp_permutation(argmax, None, 4, seed=1, num_classes=12)
    given = native.dkpp_permutation(argmax, torch.arange(20), torch.tensor(4), seed=1, num_classes=12)
    assert torch.equal(plain, given)


@pytest.mark.parametrize("classes", [1, 2, 10, 99, 100, 129, 1000, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loss_is_kd_against_the_permuted_row(classes: int, dtype: torch.dtype) -> None:
    # Bit for bit: 40 rows of few classes (several groups and blocks, some ignored), 5 of many.
    rows = 40 if classes < 1000 else 5
    generator = torch.Generator().manual_seed(classes)
    student = torch.randn(rows, classes, generator=generator).to(dtype)
    cache = torch.randn(2 * rows, classes, generator=generator).to(dtype)
    teacher_rows = torch.randperm(2 * rows, generator=generator)[:rows]
    labels = torch.arange(rows) % classes
    labels[1::7] = -100
    ids = torch.arange(rows) * 1_000_003
    options: dict[str, Any] = {**KD, "temperature": 2.0, "label_weight": 0.5}
    output = native.dkpp(student, cache, labels, ids, 9, teacher_rows, seed=5, **options)

    teacher = cache[teacher_rows]
    index = native.dkpp_permutation(teacher.float().argmax(1), ids, 9, seed=5, num_classes=classes)
    permuted = teacher.gather(1, index)
    expected = kd(student, permuted, labels, temperature=2.0, label_weight=0.5)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.grad, expected.grad)

    targets = native.dkpp_targets(cache, ids, 9, teacher_rows, seed=5, temperature=2.0)
    assert targets.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = 1e-14 if dtype == torch.float64 else 3e-7  # a few roundings of each probability
    assert torch.allclose(targets.double(), (permuted.double() / 2).softmax(1), rtol=limit * 10, atol=limit / classes)


def test_the_lowest_of_equal_maxima_is_kept() -> None:
    teacher = torch.zeros(1, 40)
    teacher[0, [7, 20, 39]] = 1.0
    doubles = teacher.double()
    doubles[0, 39] += 1e-12  # the largest in fp64, one of three in fp32, where the argmax is taken
    for logits in (teacher, doubles):
        for step in range(20):
            targets = native.dkpp_targets(logits, None, step, None, seed=0, temperature=1.0)
            assert targets[0, 7] == pytest.approx(float(teacher.softmax(1)[0, 7]))


def cwtm(student: Tensor, labels: Tensor, **given: Any) -> Any:
    options = {"teacher": None, "confidence": None, "normalizer": None, "teacher_rows": None}
    options |= {"weight_by": "teacher_max", "ignore_index": -100, "need_grad": True} | given
    teacher, confidence = options.pop("teacher"), options.pop("confidence")
    normalizer, rows = options.pop("normalizer"), options.pop("teacher_rows")
    return native.cwtm(student, teacher, labels, confidence, normalizer, rows, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_by", ["teacher_max", "teacher_label"])
@pytest.mark.parametrize("classes", [2, 10, 100, 1003])
def test_cwtm_against_float64(classes: int, weight_by: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    student = torch.randn(12, classes, generator=generator, dtype=dtype) * 3
    teacher = torch.randn(12, classes, generator=generator, dtype=dtype) * 3
    labels = torch.arange(12) % classes
    labels[4] = -100
    output = cwtm(student, labels, teacher=teacher, weight_by=weight_by)

    kept = labels != -100
    log_p = teacher.double().log_softmax(1)
    log_c = log_p.amax(1) if weight_by == "teacher_max" else log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    weight = log_c.masked_fill(~kept, -math.inf).softmax(0)
    z = student.double().requires_grad_()
    loss = (weight * torch.nn.functional.cross_entropy(z, labels, reduction="none")).sum()
    (expected,) = torch.autograd.grad(loss, z)
    true = float(loss.detach())
    limit = 8e-7 if dtype == torch.float32 else 1e-13
    assert relative_error(output.grad, expected) < limit
    assert abs(float(output.loss) - true) < limit * true
    assert torch.equal(output.label, output.loss)
    assert float(output.kd) == 0
    assert not output.grad[4].any()


def test_cwtm_where_every_label_probability_underflows() -> None:
    teacher = torch.zeros(3, 4)
    teacher[:, 0] = torch.tensor([300.0, 301.0, 302.0])
    output = cwtm(torch.zeros(3, 4), torch.tensor([1, 2, 3]), teacher=teacher, weight_by="teacher_label")
    weight = torch.tensor([300.0, 301.0, 302.0]).neg().softmax(0)
    assert torch.allclose(output.grad[:, 0], weight / 4, rtol=1e-6)


def test_cwtm_with_confidence_reads_no_teacher() -> None:
    student, labels = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    confidence = torch.rand(9, 2)[:, 0]  # stride 2
    rows = torch.tensor([8, 0, 3, 3, 1])
    output = cwtm(student, labels, confidence=confidence, teacher_rows=rows)
    c = confidence[rows]
    expected = cwtm(student, labels, confidence=(c / c.sum()).contiguous(), normalizer=torch.tensor(1.0))
    assert torch.allclose(output.grad, expected.grad, rtol=1e-6)
    half = cwtm(student, labels, confidence=confidence, teacher_rows=rows, normalizer=2 * c.sum())
    assert torch.allclose(half.grad, output.grad / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="teacher_rows: 9 in row 2 is out of range for 9 teacher rows"):
        cwtm(student, labels, confidence=confidence, teacher_rows=torch.tensor([0, 1, 9, 2, 3]))


def test_cwtm_without_rows_is_zero() -> None:
    for rows in (0, 3):
        output = cwtm(torch.randn(rows, 4), torch.full((rows,), -100), teacher=torch.randn(rows, 4))
        assert float(output.loss) == 0
        assert not output.grad.any()
