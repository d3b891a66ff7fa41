"""Rows that are read in blocks, online: over a grid of their own, in blocks so small that every edge is cheap."""

import pytest
import torch
from reference_truth import KD, truth
from torch import Tensor
from triton_truth import DKPP, FAR_ERROR, assert_close, found, logits

from ban_fast.backends.triton import config

SLOW = pytest.mark.slow
BLOCK = 64


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan is the online one, in blocks of 64 classes."""

    def plan(num_classes: int, *, permuted: bool = False, **_: bool) -> config.Plan:
        return config.Plan(1, BLOCK, 1, 4, online=True, stages=2)

    monkeypatch.setattr(config, "distill_plan", plan)
    monkeypatch.setattr(config, "RANKED_BELOW", 1)


def check(student: Tensor, teacher: Tensor, device: torch.device, bound: float = 3e-6, **options: float | str) -> None:
    labels = torch.arange(student.shape[0]) * 37 % student.shape[1]
    asked = KD | {"reduction": "none", "label_weight": 0.5, **options}
    tensors = (student, teacher, labels, None)
    wanted = truth("kd", *tensors, **asked)
    assert_close(found("kd", tensors, device, **asked), wanted, loss=bound, gradient=bound)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("classes", [63, 64, 65, *(pytest.param(n, marks=SLOW) for n in (1, 2, 127, 128, 129, 193))])
def test_classes_around_the_edges_of_blocks(classes: int, device: torch.device) -> None:
    for regime in ("random", "near", "shifted"):
        student, teacher = logits(2, classes, regime)
        for options in ({"temperature": 1.0}, {"temperature": 3.0, "divergence": "ce"}):
            check(student, teacher, device, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize(
    "regime", ["near", *(pytest.param(name, marks=SLOW) for name in ("random", "shifted", "sharper", "outlier", "far"))]
)
def test_where_the_largest_logits_are(regime: str, device: torch.device) -> None:
    """The teacher's argmax in each block, a maximum that rises with every block, and one that is never beaten."""
    bound = FAR_ERROR if regime == "far" else 3e-6
    student, teacher = logits(6, 5 * BLOCK - 7, regime)
    for row in range(5):
        at = row * BLOCK + 11
        difference = student[row, at] - teacher[row, at]
        teacher[row, at] = teacher[row].max() + 2
        student[row, at] = teacher[row, at] + difference
    ramp = torch.linspace(0, 6, student.shape[1])
    check(student, teacher, device, bound)
    check(student + ramp, teacher + ramp, device, bound)
    check(student - ramp, teacher - ramp, device, bound)
    check(student + ramp, teacher, device, FAR_ERROR)  # the student's maxima rise, the teacher's do not
    check(student, teacher + ramp, device, FAR_ERROR, divergence="ce", temperature=2.0)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("size", [30.0, *(pytest.param(x, marks=SLOW) for x in (3.0, 15.0, -30.0, 80.0, 86.0))])
def test_an_outlier_in_each_block(size: float, device: torch.device) -> None:
    """A class where student and teacher differ, near or far, with mass in the teacher or none to speak of."""
    for low in (0.0, 25.0, 95.0, 120.0):
        student, teacher = logits(5, 4 * BLOCK + 1, "near")
        for row in range(5):
            at = min(row * BLOCK + 5, student.shape[1] - 1)
            teacher[row, at] -= low
            student[row, at] += size - low
        # Where the teacher's probability underflows (e^-120, on a GPU e^-95) log-sum-exp has to serve: u = 1e-3 is of
        # logarithms near 5 that are rounded to 3e-7, and KL is its square.
        check(student, teacher, device, 3e-3 if low > 90 and size > 20 else 1e-5)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_a_student_apart_by_a_constant(shift: float, device: torch.device) -> None:
    """The first block's differences are measured from nothing: e^300, of that, may not be seen."""
    student, teacher = logits(3, 150, "near")
    check(student + shift, teacher, device)


@pytest.mark.usefixtures("in_blocks")
def test_the_mass_lies_where_the_student_is_low(device: torch.device) -> None:
    """A = -0.9995 from the first block's centre: 1 + A is rounded to 1e-4, and log-sum-exp has to serve."""
    student, teacher = torch.full((2, 40 * BLOCK), -12.0), torch.full((2, 40 * BLOCK), 0.9)
    for x in (student, teacher):
        x[:, :BLOCK] = -30
        x[:, 3] = 1
    check(student, teacher, device)


@pytest.mark.usefixtures("in_blocks")
def test_blocks_that_hold_nothing(device: torch.device) -> None:
    """The first blocks, or all but one, are -inf in both."""
    student, teacher = logits(3, 4 * BLOCK, "near")
    for row, kept in enumerate((slice(3 * BLOCK, None), slice(BLOCK, BLOCK + 1), slice(0, 7))):
        for x in (student, teacher):
            inside = x[row, kept].clone()
            x[row] = -torch.inf
            x[row, kept] = inside
    tensors = (student, teacher, None, None)
    options = KD | {"reduction": "none", "temperature": 3.0}
    assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blocks_in_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    for regime in ("near", "random"):
        student, teacher = logits(3, 150, regime)
        tensors = (student.to(dtype), teacher.to(dtype), torch.tensor([0, -100, 149]), torch.tensor([2, 0, 1]))
        options = KD | {"temperature": 3.0, "label_weight": 0.2, "divergence": "ce"}
        bounds = {"loss": 1e-12} if dtype == torch.float64 else {}
        got = found("kd", tensors, device, **options)
        assert_close(got, truth("kd", *tensors, **options), gradient=unit, **bounds)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("classes", [65, *(pytest.param(n, marks=SLOW) for n in (2, 128, 200))])
def test_dkpp_in_blocks(classes: int, device: torch.device) -> None:
    student, teacher = logits(3, classes, "random")
    tensors = (student, teacher, torch.tensor([0, 1, -100]), None, 7, torch.tensor([1, 2, 0]))
    options = DKPP | {"label_weight": 0.5, "temperature": 2.0, "divergence": "ce"}
    assert_close(found("dkpp", tensors, device, **options), truth("dkpp", *tensors, **options))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (2, 10240), (2, 10241), (1, 12288), (3, 32001), (2, 65536), (3, 130000)])
def test_the_plans_themselves(shape: tuple[int, int], device: torch.device) -> None:
    for regime in ("random", "near", "outlier"):
        student, teacher = logits(*shape, regime)
        check(student, teacher, device)
        check(student.double(), teacher.double(), device, 1e-11)
    student, teacher = logits(*shape, "far")
    check(student, teacher, device, FAR_ERROR)
