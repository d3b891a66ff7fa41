"""fused_linear_kd of tensors that are not plain memory: the right value, or an error that says why."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from ban_fast.losses import fused_linear_kd

ROWS, WIDTH, TAUGHT, CLASSES = 6, 4, 3, 5
STUDENTS = ["student_hidden", "student_weight", "student_bias"]
ARGUMENTS = [*STUDENTS, "teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits", "labels"]


def inputs(name: str = "teacher_hidden") -> dict[str, Tensor]:
    """Arguments, `name` among them: the teacher by its logits only where that is asked for."""
    torch.manual_seed(0)
    given = {
        "student_hidden": torch.randn(ROWS, WIDTH),
        "student_weight": torch.randn(CLASSES, WIDTH),
        "student_bias": torch.randn(CLASSES),
        "labels": torch.arange(ROWS) % CLASSES,
    }
    if name == "teacher_logits":
        return given | {"teacher_logits": torch.randn(ROWS, CLASSES)}
    shapes = {"teacher_hidden": (ROWS, TAUGHT), "teacher_weight": (CLASSES, TAUGHT), "teacher_bias": (CLASSES,)}
    return given | {teacher: torch.randn(shape) for teacher, shape in shapes.items()}


def compute(given: dict[str, Any], **options: Any) -> Tensor:
    return fused_linear_kd(**given, label_weight=0.5, chunk_bytes=4 * 4 * CLASSES, **options)


def gradients(given: dict[str, Any]) -> list[Tensor]:
    leaves = [given[name].detach().requires_grad_() for name in STUDENTS]
    return list(torch.autograd.grad(compute(given | dict(zip(STUDENTS, leaves, strict=True))), leaves))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_zeros_without_memory_are_zeros(name: str) -> None:
    given = inputs(name)
    zeros = torch.zeros_like(given[name])
    without_memory = torch._efficientzerotensor(zeros.shape, dtype=zeros.dtype)
    for value, expected in zip(
        gradients(given | {name: without_memory}), gradients(given | {name: zeros}), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_views_that_are_to_be_negated(name: str) -> None:
    """Their memory has the other sign."""
    given = inputs(name)
    negated = torch._neg_view(-given[name])
    assert negated.is_neg()
    assert torch.equal(compute(given | {name: negated}), compute(given))
    for value, expected in zip(gradients(given | {name: negated}), gradients(given), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_outputs_that_are_to_be_negated(reduction: str) -> None:
    def gradient(grad_output: Tensor) -> Tensor:
        given = inputs()
        given["student_weight"].requires_grad_()
        return torch.autograd.grad(compute(given, reduction=reduction), given["student_weight"], grad_output)[0]

    shape = (ROWS,) if reduction == "none" else ()
    expected = gradient(torch.full(shape, -3.0))
    assert expected.any()
    assert torch.equal(gradient(torch.full(shape, 3j).conj().imag), expected)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_argument_may_be_of_a_users_own_kind(name: str) -> None:
    given = inputs(name)
    result = compute(given | {name: TwoTensor(given[name], given[name])})
    assert torch.equal(result.a if isinstance(result, TwoTensor) else result, compute(given))


@pytest.mark.parametrize("name", STUDENTS)
def test_gradients_reach_a_users_own_kind(name: str) -> None:
    given = inputs()
    leaf = TwoTensor(given[name], given[name].clone()).requires_grad_()
    (grad,) = torch.autograd.grad(compute(given | {name: leaf}), leaf)
    assert torch.equal(grad.a, gradients(given)[STUDENTS.index(name)])


def test_fake_tensors_come_to_fake_losses() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(compute(inputs()), FakeTensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # of torch's own formulas for it
@pytest.mark.parametrize("name", STUDENTS)
def test_forward_mode_is_refused(name: str) -> None:
    """Without a tangent its answer would be that the loss does not change."""
    given = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            compute(given | {name: dual})
