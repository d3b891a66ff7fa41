"""The output layer under autocast: operands as autocast rounds them, logits that nothing rounds."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast.losses import kd_loss
from ban_fast.models import WordLSTM
from ban_fast.ops.wide_linear import wide_linear

HALVES = [torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states [T, B, H], weight [V, H], bias [V]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 16), (40, 16), (40,)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def derivatives(layer: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    logits = layer(*tensors)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    return [logits, *torch.autograd.grad(logits, tensors, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_autocast_it_is_torch_s(dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    for got, expected in zip(derivatives(wide_linear, tensors), derivatives(F.linear, tensors), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_leaves_double_precision_alone(dtype: torch.dtype) -> None:
    tensors = operands(torch.float64)
    with torch.autocast("cpu", dtype):
        found = derivatives(wide_linear, tensors)
    for got, expected in zip(found, derivatives(F.linear, tensors), strict=True):
        assert got.dtype == torch.float64
        assert torch.equal(got, expected)


def exact(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    return derivatives(F.linear, [tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_nothing_but_operands_is_rounded(dtype: torch.dtype) -> None:
    tensors = operands()
    with torch.autocast("cpu", dtype):
        found = derivatives(wide_linear, tensors)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    for got, expected in zip(found, exact(dtype, tensors), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 40 terms


@pytest.mark.parametrize("dtype", HALVES)
def test_compiled(dtype: torch.dtype) -> None:
    """Logits as exact; gradients are rounded once more, where autograd goes back through the casts."""
    torch._dynamo.reset()
    tensors = operands()
    with torch.autocast("cpu", dtype):
        found = derivatives(torch.compile(wide_linear, backend="aot_eager", fullgraph=True), tensors)
    logits, *gradients = zip(found, exact(dtype, tensors), strict=True)
    torch.testing.assert_close(logits[0].double(), logits[1], rtol=1e-5, atol=1e-5)
    for got, expected in gradients:
        assert (got - expected).norm() < 2**-8 * expected.norm()


def test_hidden_states_in_half_precision_get_gradients_of_theirs() -> None:
    hidden, weight, bias = operands()
    half = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = wide_linear(half, weight, bias)
    logits.square().sum().backward()
    assert (logits.dtype, half.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_gradients_that_are_asked_for(frozen: int) -> None:
    tensors = operands()
    tensors[frozen].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        wide_linear(*tensors).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [i == frozen for i in range(3)]


def test_second_derivatives_are_refused() -> None:
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        logits = wide_linear(*tensors)
    with pytest.raises(RuntimeError, match=r"under autocast has no second derivative.*create_graph"):
        torch.autograd.grad(logits.square().sum(), tensors, create_graph=True)


def test_operands_changed_before_backward_are_an_error() -> None:
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        logits = wide_linear(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_a_language_model_near_its_teacher_learns_from_what_differs(noise: float) -> None:
    """Gradients in bf16 against float64 from the same hidden states: a tenth of the textbook form's error at most."""
    torch.manual_seed(0)
    student = WordLSTM(32, num_classes=1000, dropout=0.0, layers=1)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    tokens = torch.randint(1000, (20, 4))

    def gradients(logits: Callable[[WordLSTM], Tensor]) -> list[Tensor]:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = logits(student).flatten(0, 1)
            with torch.no_grad():
                t = logits(teacher).flatten(0, 1)
        kd_loss(z, t).backward()
        return [parameter.grad.double().clone() for parameter in student.parameters()]

    def exact(model: WordLSTM) -> Tensor:
        hidden, _ = model(tokens, project=False)
        with torch.autocast("cpu", enabled=False):
            rounded = (tensor.bfloat16().double() for tensor in (hidden, *model.output_layer()))
            return F.linear(*rounded)

    truth = gradients(exact)
    ours = gradients(lambda model: model(tokens)[0])
    naive = gradients(lambda model: F.linear(model(tokens, project=False)[0], *model.output_layer()))
    for expected, got, rounded in zip(truth, ours, naive, strict=True):
        assert (got - expected).norm() <= 0.1 * (rounded - expected).norm()
