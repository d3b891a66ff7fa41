"""KD's native kernel with the gradient where the logits were: the same bits as beside them."""

import pytest
import torch
from torch import Tensor

from ban_fast.backends import native

OPTIONS = {"temperature": 2.0, "kd_weight": 0.7, "divergence": "kl", "scale_t2": True, "ignore_index": -100}


def student_and_teacher(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows near the teacher, far from it, and with logits of -inf, in turn: every branch of the kernel."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, classes, generator=generator, dtype=dtype)
    student = teacher + 1e-3 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    student[1::4] *= 40
    student[2::4, 1] = teacher[2::4, 1] = -torch.inf
    student[3::4, 2] += 30
    return student, teacher


# The last is written past the cache, by rows that begin at no vector.
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (9, 70), (13, 4099), (421, 10_007)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_the_bits_are_those_of_a_gradient_beside_the_logits(
    rows: int, classes: int, dtype: torch.dtype, label_weight: float
) -> None:
    student, teacher = student_and_teacher(rows, max(classes, 3), dtype)
    student, teacher = student[:, :classes].contiguous(), teacher[:, :classes].contiguous()
    labels = torch.arange(rows) % classes
    labels[4::5] = -100
    options = {**OPTIONS, "label_weight": label_weight, "reduction": "sum", "need_grad": True}
    expected = native.kd(student, teacher, labels, None, **options)
    output = native.kd_in_place(student, teacher, labels, None, **options)
    assert output.grad is student
    for value, beside in zip(output[:4], expected[:4], strict=True):
        assert torch.equal(value.nan_to_num(9.0), beside.nan_to_num(9.0))


def test_logits_that_are_kept() -> None:
    """Where no gradient is needed, or their rows do not lie side by side."""
    student, teacher = student_and_teacher(5, 40, torch.float32)
    before = student.clone()
    for logits, need_grad in ((student, False), (student[:, ::2], True)):
        taught = teacher[:, : logits.shape[1]]
        options = {**OPTIONS, "label_weight": 0.0, "reduction": "sum", "need_grad": need_grad}
        output = native.kd_in_place(logits, taught, None, None, **options)
        assert (output.grad is None) != need_grad
        assert torch.equal(output.loss, native.kd(logits, taught, None, None, **options).loss)
    assert torch.equal(student, before)
