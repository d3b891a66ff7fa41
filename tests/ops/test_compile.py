"""torch.compile and export go through the losses unbroken, and say what eager mode says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ban_fast.backends import dispatch
from ban_fast.losses import CWTMLoss, DKPPLoss, KDLoss, cwtm_loss, dkpp_loss, dkpp_targets, kd_loss

LABELS = torch.tensor([0, -100, 4, 2])


def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 5), torch.randn(4, 5)


def with_gradient(function: Callable[..., Tensor], student: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient at a grad_output that is not 1."""
    student = student.detach().requires_grad_()
    loss = function(student, *inputs)
    return loss.detach(), torch.autograd.grad((loss * 2.5).sum(), student)[0]


CASES: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "kd-mean": lambda backend: KDLoss(3.5, label_weight=0.3, backend=backend),
    "kd-sum": lambda backend: KDLoss(3.5, label_weight=0.3, reduction="sum", backend=backend),
    "kd-none": lambda backend: KDLoss(3.5, label_weight=0.3, reduction="none", backend=backend),
    "cwtm": lambda backend: CWTMLoss(backend=backend),
    "dkpp-mean": lambda backend: DKPPLoss(3.5, seed=1, backend=backend),
    "dkpp-sum": lambda backend: DKPPLoss(3.5, seed=1, reduction="sum", backend=backend),
    "dkpp-none": lambda backend: DKPPLoss(3.5, seed=1, reduction="none", backend=backend),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("kd-mean", torch.float16), ("dkpp-none", torch.float16)],
)
def test_one_graph_and_the_same_bits(backend: str, name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    loss = CASES[name](backend)
    student, teacher = logits()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for shape in ((4, 5), (2, 2, 5)):
        inputs = (student.to(dtype).view(shape), teacher.view(shape), LABELS.view(shape[:-1]))
        for value, expected in zip(with_gradient(compiled, *inputs), with_gradient(loss, *inputs), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_on_a_gpu(backend: str, name: str) -> None:
    """By the default compiler, whose graph calls the operators of CUDA tensors."""
    problem = dispatch.available("cuda")[backend]
    if problem is not None:
        pytest.skip(problem)
    agrees_as_one_graph(CASES[name](backend), torch.device("cuda", torch.cuda.current_device()))


def agrees_as_one_graph(loss: Callable[..., Tensor], device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda z, *rest: loss(1.5 * z, *rest), fullgraph=True)
    student, teacher = logits()
    inputs = student.to(device), teacher.to(device), LABELS.to(device)
    found = with_gradient(compiled, *inputs)
    expected = with_gradient(lambda z, *rest: loss(1.5 * z, *rest), *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_one_graph_by_the_default_compiler(backend: str) -> None:
    agrees_as_one_graph(CASES["cwtm"](backend), torch.device("cpu"))


@pytest.mark.parametrize("module", [False, True])
def test_step_as_a_tensor_does_not_recompile(module: bool) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    student, teacher = logits()
    loss = DKPPLoss(2.0) if module else dkpp_loss
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    student.requires_grad_()
    values = [compiled(student, teacher, step=torch.tensor(step)) for step in range(5)]
    assert counter.frame_count == 1
    assert len({value.item() for value in values}) == 5
    for step, value in enumerate(values):
        assert torch.equal(value, loss(student, teacher, step=step))
    assert torch.equal(compiled(student, teacher, step=3), values[3])  # an int works, for a compilation more
    assert counter.frame_count == 2


def test_terms_targets_and_retained_graphs() -> None:
    torch.compiler.reset()
    student, teacher = logits()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def everything(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        kd, terms = kd_loss(student, teacher, LABELS, label_weight=0.5, return_terms=True)
        cwtm = cwtm_loss(student, None, LABELS, confidence=teacher.softmax(1).amax(1), normalizer=torch.tensor(2.0))
        return kd + cwtm, terms["kd"], terms["label"], dkpp_targets(teacher, step=torch.tensor(4))

    student.requires_grad_()
    loss, kd, label, targets = everything(student, teacher)
    expected, terms = kd_loss(student, teacher, LABELS, label_weight=0.5, return_terms=True)
    assert torch.equal(kd, terms["kd"])
    assert torch.equal(label, terms["label"])
    assert torch.equal(targets, dkpp_targets(teacher, step=4))
    confidence = teacher.softmax(1).amax(1)
    expected = expected + cwtm_loss(student, None, LABELS, confidence=confidence, normalizer=torch.tensor(2.0))
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    torch.testing.assert_close(first, torch.autograd.grad(expected, student)[0])
    assert torch.equal(torch.autograd.grad(loss, student)[0], first)  # nothing was scaled in place


def test_no_gradient_and_no_graph_where_nobody_asks() -> None:
    torch.compiler.reset()
    student, teacher = logits()
    compiled = torch.compile(KDLoss(2.0), fullgraph=True, backend="aot_eager")
    assert not compiled(student, teacher).requires_grad
    with torch.no_grad():
        value = compiled(student.requires_grad_(), teacher)
    assert not value.requires_grad
    assert torch.equal(value, KDLoss(2.0)(student, teacher).detach())


def test_wrong_arguments_are_refused_under_compile() -> None:
    torch.compiler.reset()
    student, teacher = logits()
    with pytest.raises(Exception, match="teacher_logits: shape"):
        torch.compile(KDLoss(2.0), fullgraph=True, backend="aot_eager")(student, teacher[:3])
    compiled = torch.compile(KDLoss(2.0), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="labels: 5 in row 1 is out of range for 5 classes"):
        compiled(student, teacher, torch.tensor([0, 5, 1, 1]))


def test_dynamic_batch_size() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(KDLoss(2.0, label_weight=0.5), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (4, 6, 9):
        student, teacher = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 5)
        labels = torch.randint(5, (rows,))
        loss = compiled(student, teacher, labels)
        assert torch.equal(loss, KDLoss(2.0, label_weight=0.5)(student, teacher, labels))
        loss.backward()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3  # dynamo may start over in the first call, and compiles nothing after it


@pytest.mark.parametrize("module", [KDLoss(2.0, reduction="none"), CWTMLoss(), DKPPLoss(2.0)])
def test_a_batch_marked_dynamic_is_not_specialised(module: nn.Module) -> None:
    """mark_dynamic is an error where the graph fixes what it marks."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in (4, 6, 9):
        inputs = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 5), torch.randint(5, (rows,))
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        loss = compiled(*inputs)
        loss.sum().backward()
        assert torch.equal(loss, module(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_autograd_traces_an_eager_loss(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    student, teacher = logits()
    student = student.to(dtype).requires_grad_()
    expected = torch.autograd.grad(2.5 * KDLoss(2.0, backend=backend)(student, teacher), student)[0]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        (2.5 * KDLoss(2.0, backend=backend)(student, teacher)).backward()
    assert torch.equal(student.grad, expected)


def test_a_second_derivative_is_refused_under_compile() -> None:
    torch.compiler.reset()
    student, teacher = logits()
    student.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def objective(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher) + student.pow(3).sum()

    (grad,) = torch.autograd.grad(objective(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


class Step(nn.Module):
    """A student with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.loss = DKPPLoss(2.0, label_weight=0.5)

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        return self.loss(self.body(x), teacher, labels, step=step)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Step(), (torch.randn(4, 6), torch.randn(4, 5), LABELS, torch.tensor(3))
    exported = torch.export.export(model, inputs, strict=strict)
    assert any("ban_fast.dkpp" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_fake_tensors_stay_fake() -> None:
    """Memory estimators and planners run models on them: no address of theirs may reach a kernel."""
    with torch._subclasses.FakeTensorMode():
        student = torch.empty(4, 5, dtype=torch.float16, requires_grad=True)
        loss = KDLoss(2.0, reduction="none")(student, torch.empty(4, 5))
        assert loss.shape == (4,)
        loss.sum().backward()
        assert student.grad.shape == (4, 5)
        assert student.grad.dtype == torch.float16
        assert dkpp_targets(torch.empty(3, 2, 5), step=2).shape == (3, 2, 5)


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler, end to end with a model: two steps of training, as eager mode makes them."""
    torch.compiler.reset()

    def train(compile_it: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Step()
        step = torch.compile(model, fullgraph=True) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for number in range(2):
            optimizer.zero_grad()
            step(torch.randn(4, 6), torch.randn(4, 5), LABELS, torch.tensor(number)).backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    torch.testing.assert_close(train(True), train(False))


def test_functionalize() -> None:
    student, teacher = logits()
    found = torch.func.functionalize(kd_loss)(student, teacher)
    assert torch.equal(found, kd_loss(student, teacher))
