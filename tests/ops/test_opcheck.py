"""Schemas, fakes and dispatch of the operators, by torch's own checks. Inputs are detached: autograd is outside."""

from typing import Any

import pytest
import torch

from ban_fast import losses
from ban_fast.backends import dispatch

assert losses  # registers the operators

KD = {"temperature": 2.0, "kd_weight": 0.7, "divergence": "kl", "scale_t2": True, "ignore_index": -100}


def logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 5).to(dtype), torch.randn(7, 5)


LABELS, ROWS = torch.tensor([0, -100, 4, 2]), torch.tensor([6, 0, 0, 3])


def opcheck(name: str, device: torch.device, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    """torch's own checks of an operator, with operands that were made on the CPU."""
    there = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in operands)
    torch.library.opcheck(getattr(torch.ops.ban_fast, name), there, options)


class Opchecks:
    """Subclasses say of what: fixtures `backend` and `device`."""

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
    def test_kd(self, backend: str, device: torch.device, dtype: torch.dtype, reduction: str, need_grad: bool) -> None:
        student, teacher = logits(dtype)
        options: dict[str, Any] = {**KD, "reduction": reduction, "need_grad": need_grad, "backend": backend}
        opcheck("kd", device, (student, teacher, LABELS, ROWS), {**options, "label_weight": 0.3})
        transposed = student.t().contiguous().t()
        opcheck("kd", device, (transposed, teacher[:4], None, None), {**options, "label_weight": 0.0})

    @pytest.mark.parametrize(
        ("dtype", "need_grad"), [(torch.float32, True), (torch.float16, True), (torch.float64, False)]
    )
    def test_cwtm(self, backend: str, device: torch.device, dtype: torch.dtype, need_grad: bool) -> None:
        student, teacher = logits(dtype)
        options = {"weight_by": "teacher_max", "ignore_index": -100, "need_grad": need_grad, "backend": backend}
        opcheck("cwtm", device, (student, teacher, LABELS, None, None, ROWS), options)
        one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        opcheck("cwtm", device, (student, None, LABELS, torch.rand(4), one, None), options)

    @pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.float16, "none")])
    def test_dkpp(self, backend: str, device: torch.device, dtype: torch.dtype, reduction: str) -> None:
        student, teacher = logits(dtype)
        step = torch.tensor(3)
        options = {**KD, "label_weight": 0.3, "reduction": reduction, "need_grad": True, "seed": 1, "backend": backend}
        opcheck("dkpp", device, (student, teacher, LABELS, ROWS * 9, step, ROWS), options)
        targets = {"seed": -1, "temperature": 2.0, "backend": backend}
        opcheck("dkpp_targets", device, (teacher.to(dtype), None, step, None), targets)
        opcheck("dkpp_targets", device, (teacher.double(), ROWS, step, ROWS), targets)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_scale_grad(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        grad = torch.randn(4, 5).to(dtype)
        scale = torch.tensor(0.25) if dtype == torch.float16 else torch.empty(0)
        two = torch.tensor(2.0, device=device)
        for grad_output in (two, torch.tensor(1.0), torch.randn(4), two.expand(4)):
            opcheck("scale_grad", device, (grad, grad_output, scale, backend), {})


class TestOnTheCPU(Opchecks):
    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGPU(Opchecks):
    @pytest.fixture(params=["native", "triton"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        problem = dispatch.available("cuda")[request.param]
        if problem is not None:
            pytest.skip(problem)
        name: str = request.param
        return name

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("kd", {0: torch.zeros(9, 5)}, r"teacher_logits: shape \[4, 5\] is not student_logits' \[9, 5\]"),
        ("kd", {0: torch.zeros(4, 9)}, r"teacher_logits: shape \[4, 5\] is not"),
        ("kd", {0: torch.zeros(2, 2, 5)}, r"student_logits: shape \[2, 2, 5\] is not \[R, C\]"),
        ("kd", {2: LABELS[:3]}, r"labels: shape \[3\] is not \[4\]"),
        ("kd", {2: LABELS.int()}, "labels: a torch.int32 tensor"),
        ("kd", {3: ROWS[:3]}, r"teacher_rows: shape \[3\] is not \[4\]"),
        ("dkpp", {0: torch.zeros(9, 5)}, r"teacher_logits: shape \[4, 5\] is not student_logits' \[9, 5\]"),
        ("dkpp", {3: ROWS[:3]}, r"sample_ids: shape \[3\] is not \[4\]"),
        ("dkpp", {4: torch.tensor([3])}, "step: a torch.int64 tensor"),
        ("cwtm", {0: torch.zeros(9, 5)}, r"teacher_logits: shape \[4, 5\] is not student_logits' \[9, 5\]"),
        ("cwtm", {2: LABELS[:3]}, r"labels: shape \[3\] is not \[4\]"),
        ("cwtm", {1: None, 3: torch.rand(3)}, r"confidence: shape \[3\] is not \[4\]"),
        ("cwtm", {4: torch.ones(2)}, "normalizer: a torch.float32 tensor"),
        ("dkpp_targets", {1: ROWS[:3]}, r"sample_ids: shape \[3\] is not \[4\]"),
        ("scale_grad", {1: torch.ones(3)}, r"grad_output: a torch.float32 tensor of shape \[3\]"),
        ("scale_grad", {1: torch.ones(4).double()}, "grad_output: a torch.float64 tensor"),
    ],
)
def test_operands_are_checked(backend: str, name: str, changes: dict[int, Any], message: str) -> None:
    """A graph that was recorded with other shapes calls operators alone."""
    student, teacher = logits()
    operands: list[Any] = [student, teacher[:4], LABELS]
    options: dict[str, Any] = {"ignore_index": -100, "need_grad": True, "backend": backend}
    if name == "cwtm":
        operands += [None, None, None]
        options["weight_by"] = "teacher_max"
    elif name == "dkpp_targets":
        operands, options = [teacher[:4], None, torch.tensor(3), None], {"seed": 1, "temperature": 2.0}
        options["backend"] = backend
    elif name == "scale_grad":
        operands, options = [student, torch.ones(4), torch.empty(0), backend], {}
    else:
        operands += [None] if name == "kd" else [None, torch.tensor(3), None]
        options |= {**KD, "label_weight": 0.3, "reduction": "mean"} | ({} if name == "kd" else {"seed": 1})
    operator = getattr(torch.ops.ban_fast, name)
    operator(*operands, **options)
    for place, value in changes.items():
        operands[place] = value
    with pytest.raises(ValueError, match="^" + message):
        operator(*operands, **options)


def test_a_transposed_gradient_is_scaled_by_rows(backend: str) -> None:
    grad, factors = torch.randn(5, 4).t(), torch.randn(4)
    scaled = torch.ops.ban_fast.scale_grad(grad, factors, torch.empty(0), backend)
    assert torch.equal(scaled, grad * factors[:, None])
