"""fused_linear_kd in torch's machinery: autograd's refusals, operators, compilers, autocast."""

from collections.abc import Callable

import losses_truth as truth
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast.losses import fused_linear_kd, kd_loss

ROWS, WIDTH, CLASSES = 6, 4, 5
LABELS = torch.tensor([0, -100, 4, 2, 1, 1])
OPTIONS = {"temperature": 2.0, "kd_weight": 0.7, "label_weight": 0.3, "scale_t2": True, "ignore_index": -100}
BUDGET = 4 * 4 * CLASSES  # chunks of four rows of fp32 logits, and of two
REDUCTIONS = ["mean", "sum", "none"]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, teacher's logits."""
    torch.manual_seed(0)
    shapes = (ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,), (ROWS, CLASSES)
    hidden, weight, bias, teacher = (torch.randn(shape).to(dtype) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), teacher


def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    return fused_linear_kd(
        hidden,
        weight,
        LABELS,
        student_bias=bias,
        teacher_logits=teacher,
        chunk_bytes=BUDGET,
        reduction=reduction,
        **OPTIONS,
    )


def gradients(loss: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """At a grad_output that is not 1."""
    return torch.autograd.grad((loss * 2.5).sum(), parameters)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_is_refused(reduction: str) -> None:
    hidden, *others = tensors()
    loss = loss_of(hidden, *others, reduction)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="second backward through one ban_fast loss"):
        loss.backward()
    assert torch.equal(hidden.grad, first)


def test_losses_of_rows_can_be_gone_through_again() -> None:
    """Their gradients are computed in backward, from inputs that must not have changed since."""
    hidden, weight, bias, teacher = tensors()
    loss = loss_of(hidden, weight, bias, teacher, "none")
    first = torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0], first)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("name", ["labels", "teacher_logits", "teacher_hidden", "teacher_weight", "teacher_bias"])
def test_losses_of_rows_know_what_was_written_over(name: str) -> None:
    """Backward reads the teacher and the labels again: buffers that another batch was copied to are torch's error."""
    hidden, weight, bias, teacher = tensors()
    labels = LABELS.clone()
    others = {"teacher_logits": teacher}
    if name not in ("labels", "teacher_logits"):
        layer = [tensor.detach().clone() for tensor in (hidden, weight, bias)]
        others = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), layer, strict=True))
    loss = fused_linear_kd(hidden, weight, labels, student_bias=bias, reduction="none", **others, **OPTIONS)
    (labels if name == "labels" else others[name]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_losses_of_rows_keep_a_teacher_from_inference_mode() -> None:
    """Such tensors have no version to check by; a buffer of them may be written over in inference mode alone."""
    hidden, weight, bias, teacher = tensors()
    expected = gradients(loss_of(hidden, weight, bias, teacher, "none"), hidden, weight, bias)
    with torch.inference_mode():
        frozen = teacher + 0
    loss = loss_of(hidden, weight, bias, frozen, "none")
    with torch.inference_mode():
        frozen.zero_()
    assert all(torch.equal(*pair) for pair in zip(gradients(loss, hidden, weight, bias), expected, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_create_graph_is_refused(reduction: str) -> None:
    hidden, *others = tensors()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss_of(hidden, *others, reduction).sum(), hidden, create_graph=True)


def test_a_gradient_given_away_is_not_written_again() -> None:
    hidden, weight, bias, teacher = tensors()
    given = gradients(loss_of(hidden, weight, bias, teacher), hidden, weight, bias)
    before = [grad.clone() for grad in given]
    for _ in range(3):
        loss_of(hidden, weight, bias, teacher + 1).backward()
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_teacher_from_inference_mode_and_backward_without_grad_mode(reduction: str) -> None:
    hidden, weight, bias, teacher = tensors()
    expected = torch.autograd.grad(loss_of(hidden, weight, bias, teacher, reduction).sum(), hidden)[0]
    with torch.inference_mode():
        frozen = teacher + 0
    loss = loss_of(hidden, weight, bias, frozen, reduction).sum()
    with torch.no_grad():
        loss.backward()
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_operands_and_nothing_else(dtype: torch.dtype) -> None:
    """fp32 inputs under autocast are as good as F.linear's operands there; logits and sums stay fp32."""
    hidden, weight, bias, teacher = tensors()
    rounded = [tensor.detach().to(dtype).float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = loss_of(*rounded, teacher)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(hidden, weight, bias, teacher)
        assert torch.equal(loss, expected)
        value = gradients(loss, hidden, weight, bias)
    assert [grad.dtype for grad in value] == [torch.float32] * 3
    assert all(torch.equal(*pair) for pair in zip(value, gradients(expected, *rounded), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_products_of_halves_with_fp32_results(dtype: torch.dtype, reduction: str, wide_products: None) -> None:
    """The way of a GPU, its products spelled out for the CPU: gradients of logits are rounded before they go on."""
    hidden, weight, bias, teacher = tensors(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = gradients(loss_of(*exact, teacher, reduction), *exact)
    value = gradients(loss_of(hidden, weight, bias, teacher, reduction), hidden, weight, bias)
    for grad, target in zip(value, expected, strict=True):
        assert truth.relative_error(grad, target) < 2 * torch.finfo(dtype).eps  # rounded twice, and summed
    if dtype == torch.float16:  # the loss of a large batch under AMP: 1e-9 a logit, and 65536 comes with backward
        tiny = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        options = {**OPTIONS, "kd_weight": 7e-9, "label_weight": 3e-9}
        loss = fused_linear_kd(
            *tiny[:2], LABELS, student_bias=tiny[2], teacher_logits=teacher, reduction=reduction, **options
        )
        scaled = torch.autograd.grad((loss * 2.5e8).sum(), tiny)
        for grad, target in zip(scaled, expected, strict=True):
            assert truth.relative_error(grad, target) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "reduction", "need"),
    [
        (torch.float32, "mean", (True, True, True)),
        (torch.float64, "sum", (True, False, False)),
        (torch.bfloat16, "mean", (False, True, True)),
        (torch.float16, "none", (False, False, False)),
    ],
)
def test_opcheck(dtype: torch.dtype, reduction: str, need: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias, teacher = (tensor.detach() for tensor in tensors(dtype))
    needs = dict(zip(("need_hidden", "need_weight", "need_bias"), need, strict=True))
    options = {**OPTIONS, **needs, "reduction": reduction, "chunk_bytes": BUDGET, "autocast": None}
    operator = torch.ops.ban_fast.linear_kd
    torch.library.opcheck(operator, (hidden, weight, bias, LABELS, teacher, None, None, None), options)
    options.update(label_weight=0.0, autocast=torch.bfloat16, chunk_bytes=None)
    torch.library.opcheck(
        operator, (hidden, weight.t().contiguous().t(), None, None, hidden, weight, bias, None), options
    )
    if reduction != "none":
        weights = torch.randn(ROWS).to(torch.float64 if dtype == torch.float64 else torch.float32)
        torch.library.opcheck(operator, (hidden, weight, bias, None, teacher, None, None, weights), options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_and_the_same_bits(dtype: torch.dtype, reduction: str) -> None:
    torch.compiler.reset()
    hidden, weight, bias, teacher = tensors(dtype)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss, expected = (f(hidden, weight, bias, teacher, reduction) for f in (compiled, loss_of))
    assert torch.equal(loss, expected)
    pairs = zip(*(gradients(value, hidden, weight, bias) for value in (loss, expected)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_autocast_under_compile() -> None:
    torch.compiler.reset()
    hidden, weight, bias, teacher = tensors()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    exact = compiled(hidden, weight, bias, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = (f(hidden, weight, bias, teacher) for f in (compiled, loss_of))
    assert torch.equal(loss, expected)
    assert not torch.equal(loss, exact)
    pairs = zip(*(gradients(value, hidden, weight, bias) for value in (loss, expected)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_batch_of_any_size_compiles_once() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return fused_linear_kd(hidden, weight, teacher_logits=teacher)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    for rows in (4, 6, 9):
        hidden, teacher = torch.randn(rows, WIDTH, requires_grad=True), torch.randn(rows, CLASSES)
        for tensor in (hidden, teacher):
            torch._dynamo.mark_dynamic(tensor, 0)
        loss = compiled(hidden, weight, teacher)
        assert torch.equal(loss, step(hidden, weight, teacher))
        loss.backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_autograd_traces_an_eager_loss(reduction: str) -> None:
    torch.compiler.reset()
    hidden, weight, bias, teacher = tensors()
    expected = gradients(loss_of(hidden, weight, bias, teacher, reduction), hidden, weight, bias)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        (2.5 * loss_of(hidden, weight, bias, teacher, reduction)).sum().backward()
    for parameter, grad in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_fake_tensors_stay_fake() -> None:
    with torch._subclasses.FakeTensorMode():
        hidden = torch.empty(2, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(CLASSES, WIDTH, requires_grad=True)
        loss = fused_linear_kd(hidden, weight, teacher_logits=torch.empty(2, 3, CLASSES), reduction="none")
        assert loss.shape == (2, 3)
        loss.sum().backward()
        assert (hidden.grad.shape, hidden.grad.dtype) == ((2, 3, WIDTH), torch.bfloat16)
        assert (weight.grad.shape, weight.grad.dtype) == ((CLASSES, WIDTH), torch.float32)


def test_meta_tensors_have_shapes() -> None:
    with torch.device("meta"):
        hidden, weight = torch.empty(ROWS, WIDTH, requires_grad=True), torch.empty(CLASSES, WIDTH, requires_grad=True)
        loss = fused_linear_kd(hidden, weight, teacher_logits=torch.empty(ROWS, CLASSES))
        loss.backward()
    assert weight.grad.shape == weight.shape


def test_a_network_with_hooks_and_another_loss() -> None:
    torch.manual_seed(3)
    x, teacher = torch.randn(ROWS, 7), torch.randn(ROWS, CLASSES)
    body, head = torch.randn(7, WIDTH, requires_grad=True), torch.randn(CLASSES, WIDTH, requires_grad=True)

    def gradients_of(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        hidden, seen = x @ body, []
        hidden.register_hook(lambda grad: seen.append(grad.clone()))
        weights = torch.autograd.grad(of(hidden), (body, head))
        return *seen, *weights

    fused = gradients_of(
        lambda hidden: 3 * fused_linear_kd(hidden, head, teacher_logits=teacher) + hidden.pow(2).mean()
    )
    whole = gradients_of(lambda hidden: 3 * kd_loss(F.linear(hidden, head), teacher) + hidden.pow(2).mean())
    for value, expected in zip(fused, whole, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inductor(reduction: str) -> None:
    """The default compiler, end to end with a model: two steps of training, as eager mode makes them."""
    torch.compiler.reset()

    def train(compile_it: bool) -> list[Tensor]:
        torch.manual_seed(0)
        body, head = torch.nn.Linear(7, WIDTH), torch.nn.Linear(WIDTH, CLASSES)

        def step(x: Tensor, teacher: Tensor) -> Tensor:
            hidden = body(x).tanh()
            loss = fused_linear_kd(
                hidden,
                head.weight,
                LABELS,
                student_bias=head.bias,
                teacher_logits=teacher,
                reduction=reduction,
                **OPTIONS,
            )
            return loss.sum() + hidden.pow(2).mean()

        run = torch.compile(step, fullgraph=True) if compile_it else step
        parameters = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(torch.randn(ROWS, 7), torch.randn(ROWS, CLASSES)).backward()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    torch.testing.assert_close(train(True), train(False))
