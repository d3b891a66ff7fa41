"""fp16 and bf16 students: computed in fp32, rounded once; fp16 gradients keep their bits until AMP's scale comes."""

import pytest
import torch
from torch import Tensor

from ban_fast.losses import cwtm_loss, dkpp_loss, kd_loss

HALVES = [torch.float16, torch.bfloat16]
KD = {"temperature": 3.5, "kd_weight": 0.7, "label_weight": 0.3}


def case(dtype: torch.dtype, rows: int = 40, classes: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(rows, classes).to(dtype)
    labels = torch.randint(classes, (rows,))
    labels[3] = -100
    return (teacher + 0.5 * torch.randn(rows, classes)).to(dtype), teacher, labels


def gradient(student: Tensor, grad_output: Tensor, function=kd_loss, *inputs: Tensor, **options) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(function(student, *inputs, **options), student, grad_output)[0]


def assert_exact(value: Tensor, expected: Tensor) -> None:
    """Equal bits where the result is a normal number; a subnormal one was rounded twice."""
    normal = expected.abs() >= torch.finfo(expected.dtype).tiny
    assert normal.double().mean() > 0.5
    assert torch.equal(value[normal], expected[normal])
    step = torch.finfo(expected.dtype).smallest_normal * torch.finfo(expected.dtype).eps
    assert ((value - expected).abs() <= step)[~normal].all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_is_the_rounding_of_the_fp32_result(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = case(dtype)
    options = {**KD, "reduction": reduction, "backend": backend}
    one = torch.ones(40) if reduction == "none" else torch.tensor(1.0)
    value = gradient(student, one, kd_loss, teacher, labels, **options)
    assert value.dtype == dtype
    assert_exact(value, gradient(student.float(), one, kd_loss, teacher.float(), labels, **options).to(dtype))
    loss = kd_loss(student, teacher, labels, **options)
    assert torch.equal(loss, kd_loss(student.float(), teacher.float(), labels, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_another_grad_output_costs_one_rounding_more(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = case(dtype)
    options = {**KD, "reduction": reduction, "backend": backend}
    grad_output = torch.randn(40) if reduction == "none" else torch.tensor(-3.7)
    value = gradient(student, grad_output, kd_loss, teacher, labels, **options)
    fp32 = gradient(student.float(), torch.ones_like(grad_output), kd_loss, teacher.float(), labels, **options)
    factor = grad_output[:, None] if reduction == "none" else grad_output
    if dtype == torch.bfloat16:
        assert torch.equal(value, (fp32.to(dtype).float() * factor).to(dtype))
    else:
        scale = 2.0**12  # one that leaves no subnormals and overflows nothing, as the backend's own
        assert_exact(value, ((fp32 * scale).to(dtype).float() / scale * factor).to(dtype))


@pytest.mark.parametrize("weight_by", ["teacher_max", "teacher_label"])
@pytest.mark.parametrize("dtype", HALVES)
def test_cwtm_rounds_once(backend: str, dtype: torch.dtype, weight_by: str) -> None:
    student, teacher, labels = case(dtype)
    options = {"weight_by": weight_by, "backend": backend}
    one = torch.tensor(1.0)
    value = gradient(student, one, cwtm_loss, teacher, labels, **options)
    assert_exact(value, gradient(student.float(), one, cwtm_loss, teacher.float(), labels, **options).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_dkpp_rounds_once(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = case(dtype)
    options = {**KD, "seed": 3, "step": 5, "backend": backend}
    one = torch.tensor(1.0)
    value = gradient(student, one, dkpp_loss, teacher, labels, **options)
    assert_exact(value, gradient(student.float(), one, dkpp_loss, teacher.float(), labels, **options).to(dtype))


def test_amp_loss_scale_finds_gradients_that_fp16_cannot_hold(backend: str) -> None:
    """1024 near rows of 1000 classes: the gradients are near 1e-9, fp16 ends at 6e-8, and the loss scale is 65536."""
    student, teacher, labels = case(torch.float16, 1024, 1000)
    student = (teacher.float() + 1e-2 * torch.randn(1024, 1000)).half()
    scale = torch.tensor(65536.0)
    exact = gradient(student.double(), scale.double(), kd_loss, teacher.double(), labels, backend=backend)
    assert (exact / 65536).half().count_nonzero() < 0.2 * exact.numel()  # what rounding before the scale leaves
    value = gradient(student, scale, kd_loss, teacher, labels, backend=backend)
    # 2^-11 for each of two roundings; subnormals beside elements of usual size add little to the norm
    assert (value.double() - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1e6, 0.0), (1e-6, 0.0), (0.0, 3e4), (0.0, 0.0), (1e-40, 0.0)])
def test_no_weight_overflows_the_stored_gradient(backend: str, weights: tuple[float, float]) -> None:
    student, teacher, labels = case(torch.float16)
    kd_weight, label_weight = weights
    options = {"temperature": 8.0, "kd_weight": kd_weight, "label_weight": label_weight, "reduction": "sum"}
    value = gradient(student, torch.tensor(1.0), kd_loss, teacher, labels, backend=backend, **options)
    fp32 = gradient(student.float(), torch.tensor(1.0), kd_loss, teacher.float(), labels, backend=backend, **options)
    expected = fp32.half()
    assert not value.isnan().any()
    finite = expected.isfinite()
    step = 2.0**-24
    assert ((value - expected)[finite].abs() <= step).all()
    assert torch.equal(value[~finite], expected[~finite])


def test_a_gradient_near_the_end_of_fp32_keeps_its_sign_and_digits(backend: str) -> None:
    """No power of two of fp32's reaches from 1e-37 to fp16's range; the largest one that does not leave fp32 serves."""
    student, teacher, labels = case(torch.float16)
    options = {"kd_weight": 1e-37, "reduction": "sum", "backend": backend}
    value = gradient(student, torch.tensor(1e37), kd_loss, teacher, labels, **options)
    exact = gradient(student.double(), torch.tensor(1e37).double(), kd_loss, teacher.double(), labels, **options)
    assert (value.double() - exact).norm() < 1e-2 * exact.norm()


def test_grad_scaler_trains(backend: str) -> None:
    """torch's GradScaler, end to end: scaled loss, unscaled gradients, as in fp32."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(6, 5))
    features, teacher = torch.randn(8, 6), torch.randn(8, 5)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(kd_loss((features @ weight).half(), teacher.half(), backend=backend)).backward()
    scaler.unscale_(optimizer)
    value = weight.grad.clone()
    optimizer.zero_grad()
    kd_loss(features @ weight, teacher.half(), backend=backend).backward()
    # fp16 logits are off by 2^-11 of about 3, and q - p by that
    torch.testing.assert_close(value, weight.grad, rtol=0, atol=3e-3)
