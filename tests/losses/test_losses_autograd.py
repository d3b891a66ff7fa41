"""The graph behind a loss: when there is one, what it hands back, and what it refuses."""

from collections.abc import Callable

import losses_truth as truth
import pytest
import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.losses import cwtm_loss, dkpp_loss, dkpp_targets, kd_loss

LABELS = torch.arange(6) % 5
Loss = Callable[..., Tensor]


@pytest.fixture(params=["kd", "cwtm", "dkpp"])
def loss_function(request: pytest.FixtureRequest) -> Loss:
    functions: dict[str, Loss] = {"kd": kd_loss, "cwtm": cwtm_loss, "dkpp": dkpp_loss}
    return functions[request.param]


def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)


def test_a_second_backward_is_refused(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    loss = loss_function(student, teacher, LABELS, backend=backend)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    with pytest.raises(RuntimeError, match="second backward through one ban_fast loss"):
        loss.backward()
    assert torch.equal(student.grad, first)


def test_create_graph_is_refused_and_nothing_is_lost(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    loss = loss_function(student, teacher, LABELS, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)
    again = loss_function(student, teacher, LABELS, backend=backend)
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (loss, again)))


def test_two_losses_of_one_student_add_up(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    loss = loss_function(student, teacher, LABELS, backend=backend)
    once = truth.gradient(loss_function(student, teacher, LABELS, backend=backend), student)
    (2 * loss + 3 * loss_function(student, teacher, LABELS, backend=backend) + student.sum()).backward()
    torch.testing.assert_close(student.grad, 5 * once + 1)


def test_no_gradient_reaches_the_teacher(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    teacher.requires_grad_()
    loss_function(student, teacher, LABELS, backend=backend).backward()
    assert student.grad is not None
    assert teacher.grad is None
    loss = loss_function(student.detach(), teacher, LABELS, backend=backend)
    assert not loss.requires_grad


def test_no_gradient_is_computed_that_nobody_can_ask_for(
    backend: str, loss_function: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = logits()
    module = dispatch.named(backend, "cpu")
    name = loss_function.__name__.removesuffix("_loss")
    compute, outputs = getattr(module, name), []

    def recorded(*inputs, **options):
        outputs.append(compute(*inputs, **options))
        return outputs[-1]

    monkeypatch.setattr(module, name, recorded)
    monkeypatch.delattr(module, f"usual_{name}", raising=False)  # test_native_usual.py sees to that one
    with torch.no_grad():
        assert not loss_function(student, teacher, LABELS, backend=backend).requires_grad
    with torch.inference_mode():
        loss_function(student, teacher, LABELS, backend=backend)
    assert not loss_function(student.detach(), teacher, LABELS, backend=backend).requires_grad
    assert [output.grad for output in outputs] == [None] * 3
    assert [output.grad_scale for output in outputs] == [None] * 3
    value = loss_function(student, teacher, LABELS, backend=backend)
    assert outputs[-1].grad is not None
    torch.testing.assert_close(value.detach(), outputs[0].loss)


def test_outputs_share_no_memory(backend: str) -> None:
    module = dispatch.named(backend, "cpu")
    student, teacher = (tensor.detach() for tensor in logits())
    options = {"temperature": 1.0, "kd_weight": 1.0, "label_weight": 0.0, "divergence": "kl", "scale_t2": True}
    for reduction in ("mean", "none"):
        output = module.kd(
            student, teacher, LABELS, None, **options, ignore_index=-100, reduction=reduction, need_grad=True
        )
        weighted = module.cwtm(
            student, teacher, LABELS, None, None, None, weight_by="teacher_max", ignore_index=-100, need_grad=True
        )
        for tensors in ((*output[:4], student, teacher), (*weighted[:4], student, teacher)):
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_nothing(backend: str, loss_function: Loss, dtype: torch.dtype, autocast: torch.dtype) -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 5, dtype=dtype, requires_grad=True), torch.randn(6, 5, dtype=dtype)
    expected = loss_function(student, teacher, LABELS, backend=backend)
    with torch.autocast("cpu", dtype=autocast):
        loss = loss_function(student, teacher, LABELS, backend=backend)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
        grad = truth.gradient(loss, student)
    assert torch.equal(grad, truth.gradient(expected, student))


def test_parameters_as_logits_and_gradient_accumulation(backend: str, loss_function: Loss) -> None:
    _, teacher = logits()
    student = torch.nn.Parameter(torch.randn(6, 5))
    loss_function(student, teacher, LABELS, backend=backend).backward()
    once = student.grad.clone()
    (2 * loss_function(student, teacher, LABELS, backend=backend)).backward()
    torch.testing.assert_close(student.grad, 3 * once)


def test_grad_output_of_every_row(backend: str) -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    weights = torch.randn(2, 3)
    loss = kd_loss(student, teacher, reduction="none", backend=backend)
    grad = truth.gradient((loss * weights).sum(), student)
    plain = truth.gradient(kd_loss(student, teacher, reduction="none", backend=backend).sum(), student)
    torch.testing.assert_close(grad, plain * weights[..., None])
    assert truth.gradient(kd_loss(student, teacher, reduction="none", backend=backend).sum() * 0, student).any() == 0


def test_outputs_follow_the_inputs_and_not_the_default_device(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    expected = loss_function(student, teacher, LABELS, backend=backend)
    with torch.device("meta"):
        loss = loss_function(student, teacher, LABELS, backend=backend)
        grad = truth.gradient(loss, student)
        targets = dkpp_targets(teacher, backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, truth.gradient(expected, student))
    assert torch.equal(targets, dkpp_targets(teacher, backend=backend))


def test_a_student_inside_a_network_with_hooks_and_other_losses(backend: str, loss_function: Loss) -> None:
    torch.manual_seed(3)
    weight, x, teacher = torch.randn(7, 5, requires_grad=True), torch.randn(6, 7), torch.randn(6, 5)

    def gradients(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        student, seen = x @ weight, []
        student.register_hook(lambda grad: seen.append(grad.clone()))
        student.retain_grad()
        (into_weight,) = torch.autograd.grad(of(student), weight)
        return seen[0], into_weight

    alone = gradients(lambda student: loss_function(student, teacher, LABELS, backend=backend))
    other = gradients(lambda student: student.pow(2).mean())
    both = gradients(
        lambda student: 3 * loss_function(student, teacher, LABELS, backend=backend) - student.pow(2).mean()
    )
    for value, a, b in zip(both, alone, other, strict=True):
        torch.testing.assert_close(value, 3 * a - b)


def test_a_gradient_given_away_is_not_written_again(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    loss = loss_function(student, teacher, LABELS, backend=backend)
    (given,) = torch.autograd.grad(loss, student)
    before = given.clone()
    for _ in range(3):
        loss_function(student, teacher + 1, LABELS, backend=backend).backward()
    assert torch.equal(given, before)
    given.zero_()  # nor does what its owner does with it reach anything of ours
    again = truth.gradient(loss_function(student, teacher, LABELS, backend=backend), student)
    assert torch.equal(again, before)


def test_a_loss_changed_in_place(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    once = truth.gradient(loss_function(student, teacher, LABELS, backend=backend), student)
    loss = loss_function(student, teacher, LABELS, backend=backend)
    loss.mul_(3)
    torch.testing.assert_close(truth.gradient(loss, student), 3 * once)


def test_backward_without_grad_mode_and_a_teacher_from_inference_mode(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    expected = truth.gradient(loss_function(student, teacher, LABELS, backend=backend), student)
    with torch.inference_mode():
        frozen = teacher + 0
    loss = loss_function(student, frozen, LABELS, backend=backend)
    with torch.no_grad():
        loss.backward()
    assert torch.equal(student.grad, expected)


class Subclass(Tensor):
    """A tensor of a user's own kind: it goes by the dispatcher."""


def test_a_subclass_of_tensor_as_student(backend: str, loss_function: Loss) -> None:
    student, teacher = logits()
    expected = truth.gradient(loss_function(student, teacher, LABELS, backend=backend), student)
    other = student.detach().as_subclass(Subclass).requires_grad_()
    loss = loss_function(other, teacher, LABELS, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, other, create_graph=True)
    assert torch.equal(truth.gradient(loss, other).as_subclass(Tensor), expected)
