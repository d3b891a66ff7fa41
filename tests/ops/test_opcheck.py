"""Schemas, fakes and dispatch of the operators, by torch's own checks. Inputs are detached: autograd is outside."""

from typing import Any

import pytest
import torch

from ban_fast import losses

assert losses  # registers the operators

KD = {"temperature": 2.0, "kd_weight": 0.7, "divergence": "kl", "scale_t2": True, "ignore_index": -100}


def logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 5).to(dtype), torch.randn(7, 5)


LABELS, ROWS = torch.tensor([0, -100, 4, 2]), torch.tensor([6, 0, 0, 3])


@pytest.mark.parametrize(
    ("dtype", "reduction", "need_grad"),
    [
        (torch.float32, "mean", True),
        (torch.float64, "sum", True),
        (torch.bfloat16, "none", True),
        (torch.float16, "mean", True),
        (torch.float16, "none", False),
    ],
)
def test_kd(backend: str, dtype: torch.dtype, reduction: str, need_grad: bool) -> None:
    student, teacher = logits(dtype)
    options: dict[str, Any] = {**KD, "reduction": reduction, "need_grad": need_grad, "backend": backend}
    torch.library.opcheck(torch.ops.ban_fast.kd, (student, teacher, LABELS, ROWS), {**options, "label_weight": 0.3})
    torch.library.opcheck(
        torch.ops.ban_fast.kd, (student.t().contiguous().t(), teacher[:4], None, None), {**options, "label_weight": 0.0}
    )


@pytest.mark.parametrize(("dtype", "need_grad"), [(torch.float32, True), (torch.float16, True), (torch.float64, False)])
def test_cwtm(backend: str, dtype: torch.dtype, need_grad: bool) -> None:
    student, teacher = logits(dtype)
    options = {"weight_by": "teacher_max", "ignore_index": -100, "need_grad": need_grad, "backend": backend}
    torch.library.opcheck(torch.ops.ban_fast.cwtm, (student, teacher, LABELS, None, None, ROWS), options)
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.ban_fast.cwtm, (student, None, LABELS, torch.rand(4), one, None), options)


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.float16, "none")])
def test_dkpp(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = logits(dtype)
    step = torch.tensor(3)
    options = {**KD, "label_weight": 0.3, "reduction": reduction, "need_grad": True, "seed": 1, "backend": backend}
    torch.library.opcheck(torch.ops.ban_fast.dkpp, (student, teacher, LABELS, ROWS * 9, step, ROWS), options)
    targets = {"seed": -1, "temperature": 2.0, "backend": backend}
    torch.library.opcheck(torch.ops.ban_fast.dkpp_targets, (teacher.to(dtype), None, step, None), targets)
    torch.library.opcheck(torch.ops.ban_fast.dkpp_targets, (teacher.double(), ROWS, step, ROWS), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_grad(backend: str, dtype: torch.dtype) -> None:
    grad = torch.randn(4, 5).to(dtype)
    scale = torch.tensor(0.25) if dtype == torch.float16 else torch.empty(0)
    for grad_output in (torch.tensor(2.0), torch.tensor(1.0), torch.randn(4), torch.tensor(2.0).expand(4)):
        torch.library.opcheck(torch.ops.ban_fast.scale_grad, (grad, grad_output, scale, backend))
