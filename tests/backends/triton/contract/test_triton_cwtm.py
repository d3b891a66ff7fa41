from typing import Any

import pytest
import torch
from reference_truth import truth
from torch import Tensor
from triton_truth import CWTM, assert_close, found, logits

from ban_fast.backends.triton import config

SLOW = pytest.mark.slow
SOURCES = ["teacher_max", "teacher_label", "given", "given, with a normalizer", "teacher_label, with a normalizer"]


def case(
    rows: int,
    classes: int,
    source: str,
    *,
    teachers: int = 9,
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options: labels of which some are ignored, and rows of a teacher that has `teachers`."""
    student, teacher = logits(max(rows, teachers), classes, regime)
    labels = torch.arange(rows) % classes
    labels[1::4] = -100
    confidence = torch.rand(teachers, generator=torch.Generator().manual_seed(0))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    given = source.startswith("given")
    tensors = (
        student[:rows].to(dtype),
        None if given else teacher[:teachers].to(dtype),
        labels,
        confidence if given else None,
        torch.tensor(3.7, dtype=acc) if "normalizer" in source else None,
        (torch.arange(rows) * 5 + 1) % teachers,
    )
    by = "teacher_label" if source.startswith("teacher_label") else "teacher_max"
    return tensors, CWTM | {"weight_by": by}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "classes", [3, 100, 2050, 17000, *(pytest.param(n, marks=SLOW) for n in (2, 10, 33, 129, 1000))]
)
def test_cwtm_is_accurate(classes: int, source: str, device: torch.device) -> None:
    tensors, options = case(5 if classes < 2000 else 3, classes, source)
    assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_cwtm_in_every_dtype_and_plan(source: str, dtype: torch.dtype, device: torch.device) -> None:
    unit = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    for classes in (2, 16, 17, 64, 65, 129, 257, 513, 1025, 4095, 4096, 4097, 8193, 9001):
        tensors, options = case(6, classes, source, dtype=dtype)
        bounds = {"loss": 1e-12} if dtype == torch.float64 else {}
        assert_close(
            found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options), gradient=unit, **bounds
        )


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_cwtm_of_far_logits(source: str, device: torch.device) -> None:
    for classes in (2, 33, 200, 5000):
        tensors, options = case(6, classes, source, regime="far")
        # Eq 9's weight is exp(log p - log sum), both near 100 in fp32: 2 * 100 * 2^-24, and the cross-entropy's own.
        bounds = {"loss": 2e-5, "gradient": 2e-5}
        assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options), **bounds)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_a_large_batch_adds_its_confidences_up_first(source: str, device: torch.device) -> None:
    rows = 2100
    assert rows > config.cross_entropy_plan(3, aligned=False, double=False).counted_below
    tensors, options = case(rows, 3, source)
    assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options))


def test_rows_without_teacher_rows_and_strided_vectors(device: torch.device) -> None:
    for source in SOURCES:
        (student, teacher, labels, confidence, normalizer, _), options = case(9, 40, source)
        spread = torch.stack([labels, labels], 1)[:, 0]
        if confidence is not None:
            confidence = torch.stack([confidence, confidence], 1)[:, 1]
        wide = student.T.contiguous().T
        tensors = (wide, teacher if teacher is None else teacher.T.contiguous().T, spread, confidence, normalizer, None)
        assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options))


def test_a_vanishing_confidence_weighs_nothing(device: torch.device) -> None:
    """Eq 9 where every p_label underflows in fp32; and weight 0 beside an infinite cross-entropy."""
    for classes in (20, 20000):
        (student, teacher, labels, _, _, rows), options = case(6, classes, "teacher_label", teachers=6)
        for row, gap in enumerate((150.0, 151.0, 149.5, 400.0, 150.5, 152.0)):
            teacher[rows[row], labels[row].clamp_min(0)] -= gap
        tensors: tuple[Any, ...] = (student, teacher, labels, None, None, rows)
        bounds = {"loss": 2e-5, "gradient": 2e-5}  # exp(c - log sum) where c is -150 in fp32: 150 * 2^-24, and more
        assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options), **bounds)
        confidence = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
        student[2, int(labels[2])] = -torch.inf
        tensors = (student, None, labels, confidence, None, None)
        options = CWTM | {"weight_by": "teacher_max"}
        got = found("cwtm", tensors, device, **options)
        assert got.loss.isfinite()
        assert_close(got, truth("cwtm", *tensors, **options))


def test_fp16_gradients_of_cwtm_are_stored_as_large_as_fits(device: torch.device) -> None:
    for source in SOURCES:
        tensors, options = case(8, 50, source, dtype=torch.float16)
        got = found("cwtm", tensors, device, **options)
        assert got.grad_scale is not None
        assert torch.frexp(got.grad_scale)[0] == 0.5
        assert_close(got, truth("cwtm", *tensors, **options), gradient=2**-10)


def test_few_programs_of_cwtm_take_many_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MAX_PROGRAMS", 3)
    for source in SOURCES:
        tensors, options = case(50, 10, source)
        assert_close(found("cwtm", tensors, device, **options), truth("cwtm", *tensors, **options))


def test_cwtm_of_empty_and_ignored_batches_and_forward_only(device: torch.device) -> None:
    for source in SOURCES:
        tensors, options = case(6, 7, source)
        nothing: tuple[Tensor | None, ...] = (
            tensors[0][:0], tensors[1], tensors[2][:0], tensors[3], tensors[4], tensors[5][:0],
        )  # fmt: skip
        output = found("cwtm", nothing, device, **options)
        assert output.loss == output.kd == output.label == 0
        assert output.grad is not None
        assert output.grad.shape == (0, 7)
        ignored = (*tensors[:2], torch.full((6,), -100), *tensors[3:])
        output = found("cwtm", ignored, device, **options)
        assert output.loss == output.kd == output.label == 0
        assert output.grad is not None
        assert not output.grad.any()
        forward = found("cwtm", tensors, device, **options | {"need_grad": False})
        assert forward.grad is None
        assert torch.equal(forward.loss, found("cwtm", tensors, device, **options).loss)
