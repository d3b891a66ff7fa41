"""Tensors that are not plain memory, and torch's machinery around a call: the right value, or an error that says why.

Backends read addresses. What they would find there, where a tensor only stands for something, is another's memory,
or none.
"""

from collections.abc import Callable
from typing import Any

import losses_truth as truth
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ban_fast.losses import cwtm_loss, dkpp_loss, dkpp_targets, kd_loss

ROWS, CLASSES = 6, 5
Loss = Callable[..., Tensor]


@pytest.fixture(params=["kd", "cwtm", "dkpp"])
def compute(request: pytest.FixtureRequest, backend: str) -> Loss:
    """A loss of `inputs()`, any of them changed by keyword."""

    given = inputs()

    def computed(**changed: Any) -> Tensor:
        call = {**given, "backend": backend, **changed}
        if request.param == "cwtm":
            return cwtm_loss(**call)
        return (kd_loss if request.param == "kd" else dkpp_loss)(label_weight=0.5, **call)

    return computed


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, CLASSES, generator=generator)
    indices = {"labels": torch.arange(ROWS) % CLASSES, "teacher_rows": torch.arange(ROWS).flip(0)}
    return {"student_logits": student, "teacher_logits": teacher, **indices}


ARGUMENTS = ["student_logits", "teacher_logits", "labels", "teacher_rows"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_zeros_without_memory_are_zeros(compute: Loss, name: str) -> None:
    zeros = torch.zeros_like(inputs()[name])
    without_memory = torch._efficientzerotensor(zeros.shape, dtype=zeros.dtype)
    assert torch.equal(compute(**{name: without_memory}), compute(**{name: zeros}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_argument_may_be_of_a_users_own_kind(compute: Loss, name: str) -> None:
    """TwoTensor has no memory of its own: an address of 0, which to the kernels is an argument that was not given."""
    value = inputs()[name]
    result = compute(**{name: TwoTensor(value, value)})
    assert torch.equal(result.a if isinstance(result, TwoTensor) else result, compute())


@pytest.mark.parametrize("name", ["teacher_logits", "sample_ids", "step", "teacher_rows"])
def test_any_argument_of_targets_may_be_of_a_users_own_kind(backend: str, name: str) -> None:
    call = {name: value for name, value in inputs().items() if name.startswith("teacher")}
    call |= {"sample_ids": torch.arange(ROWS) + 3, "step": torch.tensor(2)}
    expected = dkpp_targets(**call, backend=backend)
    targets = dkpp_targets(**call | {name: TwoTensor(call[name], call[name])}, backend=backend)
    assert torch.equal(targets.a if isinstance(targets, TwoTensor) else targets, expected)


@pytest.mark.parametrize("each_row", [False, True])
def test_grad_outputs_that_are_not_what_their_memory_says(backend: str, each_row: bool) -> None:
    student, teacher = inputs()["student_logits"].requires_grad_(), inputs()["teacher_logits"]

    def gradient(grad_output: Tensor) -> Tensor:
        loss = kd_loss(student, teacher, reduction="none" if each_row else "sum", backend=backend)
        return torch.autograd.grad(loss, student, grad_output)[0]

    shape = (ROWS,) if each_row else ()
    expected = gradient(torch.full(shape, -3.0))
    negated = torch.full(shape, 3j).conj().imag
    assert negated.is_neg()
    assert expected.any()
    assert torch.equal(gradient(negated), expected)
    assert torch.equal(gradient(torch.full(shape, -3.0, dtype=torch.float64)), expected)
    assert not gradient(torch._efficientzerotensor(shape)).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # of torch's own formulas for it
def test_forward_mode_is_refused(compute: Loss) -> None:
    """Without a tangent its answer would be that the loss does not change."""
    student = inputs()["student_logits"]
    with forward_ad.dual_level():
        for primal in (student, student.clone().requires_grad_()):
            dual = forward_ad.make_dual(primal, torch.ones_like(student))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                compute(student_logits=dual)
        teacher = forward_ad.make_dual(inputs()["teacher_logits"], torch.ones_like(student))
        assert torch.equal(compute(teacher_logits=teacher), compute())
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda value: compute(student_logits=value), (student,), (student,))


def test_transforms_of_functions_are_refused(compute: Loss, backend: str) -> None:
    """Where kernels would have to read wrappers; the reference's plain operators serve those that need no gradient."""
    student, labels = inputs()["student_logits"], inputs()["labels"]
    match = r"transform of torch.func \(vmap, grad"
    with pytest.raises(RuntimeError, match=match):
        torch.func.grad(lambda value: compute(student_logits=value))(student)
    if backend == "reference":
        return
    with pytest.raises(RuntimeError, match=match):
        torch.func.vmap(lambda value: compute(student_logits=value))(torch.stack([student, student]))
    with pytest.raises(RuntimeError, match=match):
        torch.func.vmap(lambda value: compute(labels=value))(torch.stack([labels, labels]))
    with pytest.raises(RuntimeError, match=match):
        torch.func.vmap(lambda value: dkpp_targets(value, backend=backend))(torch.stack([student, student]))


def test_batched_gradients_are_refused(backend: str) -> None:
    student = inputs()["student_logits"].requires_grad_()
    loss = kd_loss(student, inputs()["teacher_logits"], reduction="none", backend=backend)
    with pytest.raises(RuntimeError, match="batched gradients"):
        torch.autograd.grad(loss, student, torch.eye(ROWS), is_grads_batched=True)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_graphs_recorded_by_make_fx_compute(compute: Loss, mode: str) -> None:
    """And do not hold the value that they were recorded with."""

    def of(*tensors: Tensor) -> Tensor:
        return compute(**dict(zip(ARGUMENTS, tensors, strict=True)))

    student, *others = inputs().values()
    graph = make_fx(of, tracing_mode=mode)(student, *others)
    assert torch.equal(graph(2 * student, *others), of(2 * student, *others))


def test_a_mode_of_fake_tensors_computes_nothing(compute: Loss) -> None:
    """Neither with fake tensors nor with real ones, whose memory no backend's fresh tensors would have there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(compute(), FakeTensor)
        student = mode.from_tensor(inputs()["student_logits"]).requires_grad_()
        assert isinstance(truth.gradient(compute(student_logits=student), student), FakeTensor)
    strict = FakeTensorMode()
    fakes = {name: strict.from_tensor(value) for name, value in inputs().items()}
    assert isinstance(compute(**fakes), FakeTensor)  # outside of it as well
    with pytest.raises(Exception, match="convert all Tensors to FakeTensors first"):
        compute(labels=fakes["labels"])


def test_modes_that_look_on_change_nothing(compute: Loss) -> None:
    student = inputs()["student_logits"].requires_grad_()
    expected = compute(student_logits=student)
    with FlopCounterMode(display=False):
        loss = compute(student_logits=student)
    assert torch.equal(loss, expected)
    assert torch.equal(truth.gradient(loss, student), truth.gradient(expected, student))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(compute: Loss, reentrant: bool) -> None:
    student = inputs()["student_logits"].requires_grad_()
    expected = 2 * truth.gradient(compute(student_logits=student), student)
    loss = checkpoint(lambda value: compute(student_logits=value * 1), student, use_reentrant=reentrant)
    (2 * loss).backward()
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_jit_trace_is_refused(compute: Loss) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot see into a ban_fast loss"):
        torch.jit.trace(lambda value: compute(student_logits=value), inputs()["student_logits"])
