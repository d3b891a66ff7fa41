"""KD's native kernel on its own ground: vector lengths, tails, types, strides, streaming, both numeric branches."""

from collections.abc import Callable

import pytest
import torch
from native_cases import final_gradient, kd, relative_error, truth
from torch import Tensor

from ban_fast.backends import native

# What this form reaches (gradient 8e-7, KL 2e-6); the promise is 2e-6 and 1e-4.
GRADIENT_LIMIT, KL_LIMIT = 8e-7, 2e-6


def logits(rows: int, classes: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 3.5], ids=["unit", "divided"])
def test_every_tail_length(temperature: float) -> None:
    # 1 to 70 classes: every tail of a 16-lane vector behind zero to four whole ones, in fp32 and in fp64's 8 lanes.
    for classes in range(1, 71):
        teacher, labels = logits(5, classes), torch.arange(5) % classes
        student = teacher + logits(5, classes, scale=0.5, seed=1)
        options = {"temperature": temperature, "label_weight": 0.7}
        expected = truth(student, teacher, labels, **options)
        single, double = kd(student, teacher, labels, **options), kd(student.double(), teacher, labels, **options)
        if classes == 1:  # nothing to tell apart
            assert float(single.loss) == 0
            assert not single.grad.any()
            continue
        assert relative_error(single.grad, expected.grad) < GRADIENT_LIMIT, classes
        assert relative_error(double.grad, expected.grad) < 1e-13, classes
        assert abs(float(double.kd - expected.kd)) < 1e-13 * float(expected.kd), classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5, 20.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0, 100.0])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("classes", [10, 257, 10_000])
def test_near_and_far_from_the_teacher(classes: int, noise: float, shift: float, temperature: float) -> None:
    teacher = logits(6, classes)
    student = teacher + shift + noise * logits(6, classes, scale=1.0, seed=1)
    output, expected = kd(student, teacher, temperature=temperature), truth(student, teacher, temperature=temperature)
    if torch.equal(student, teacher):
        assert float(output.kd) == 0
        assert not output.grad.any()
        return
    assert relative_error(output.grad, expected.grad) < GRADIENT_LIMIT
    assert float(output.kd) >= 0
    assert abs(float(output.kd) - float(expected.kd)) < KL_LIMIT * float(expected.kd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_by_log_sum_exp(dtype: torch.dtype) -> None:
    # One row each: |d| beyond 20; a student far more peaked than its teacher (1 + A below 1/4); logits of +-1e4.
    teacher = torch.zeros(3, 1000, dtype=dtype)
    student = logits(3, 1000).to(dtype)
    student[0, 5] += 30
    student[1, 7] += 18
    student[2] = 1e4 * torch.sign(student[2])
    teacher[2] = student[2].roll(1) + logits(1, 1000, seed=3).to(dtype)[0]
    output, expected = kd(student, teacher), truth(student, teacher)
    limit = 1e-5 if dtype == torch.float32 else 1e-13  # what log-sum-exp reaches in fp32
    assert relative_error(output.grad, expected.grad) < limit
    assert abs(float(output.kd) - float(expected.kd)) < limit * float(expected.kd)


def test_minus_infinity() -> None:
    inf = float("inf")
    teacher, student = logits(4, 37), logits(4, 37, seed=1)
    student[3] = teacher[3] + 1e-3 * student[3]
    teacher[:, [0, 20, 36]] = student[:, [0, 20, 36]] = -inf  # both: nothing, and the rest stays near
    teacher[1, 3] = -inf  # the teacher alone
    student[2, 4] = -inf  # the student alone
    kept = [i for i in range(37) if i not in (0, 20, 36)]
    output = kd(student, teacher, reduction="none")
    for row in (0, 3):
        expected = truth(student[row : row + 1, kept], teacher[row : row + 1, kept])
        assert relative_error(output.grad[row, kept], expected.grad[0]) < GRADIENT_LIMIT
        assert abs(float(output.kd[row]) - float(expected.kd)) < KL_LIMIT * float(expected.kd)
        assert not output.grad[row, [0, 20, 36]].any()
    difference = student.double().softmax(1) - teacher.double().softmax(1)
    assert relative_error(output.grad[1:3], difference[1:3]) < 1e-6
    assert output.kd[1].isfinite()
    assert output.kd[2] == inf


def test_nan_stays_in_its_row_and_is_not_swallowed() -> None:
    for at in (0, 5, 16, 20):  # first lane, tail, whole vector
        for which in ("student", "teacher"):
            tensors = {"student": logits(3, 21), "teacher": logits(3, 21, seed=1)}
            tensors[which][1, at] = float("nan")
            output = kd(tensors["student"], tensors["teacher"], reduction="none")
            assert output.loss.isnan().tolist() == [False, True, False]
            assert output.grad.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("student_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_convert_before_anything_else(student_type: torch.dtype, teacher_type: torch.dtype) -> None:
    # The same bits as converting first: half precision loses nothing but the gradient's last rounding.
    student, teacher = logits(9, 133).to(student_type), logits(9, 133, seed=1).to(teacher_type)
    labels = torch.arange(9)
    acc = torch.float64 if student_type == torch.float64 else torch.float32
    output = kd(student, teacher, labels, label_weight=0.5, temperature=3.0)
    converted = kd(student.to(acc), teacher.to(acc), labels, label_weight=0.5, temperature=3.0)
    assert output.loss.dtype == output.kd.dtype == output.label.dtype == acc
    assert output.grad.dtype == student_type
    assert torch.equal(output.loss, converted.loss)
    if student_type == torch.bfloat16:
        assert torch.equal(output.grad, converted.grad.bfloat16())
    elif student_type == torch.float16:
        scale = output.grad_scale
        assert scale.dtype == torch.float32
        assert torch.equal(output.grad, (converted.grad / scale).half())
    else:
        assert torch.equal(output.grad, converted.grad)


@pytest.mark.parametrize("weight", [1e-6, 1.0, 3e4])
def test_fp16_gradients_use_the_range_and_do_not_leave_it(weight: float) -> None:
    # Opposite one-hot rows have |q - p| = 1: the largest gradient there is.
    student, teacher = torch.zeros(2, 8).half(), torch.zeros(2, 8)
    student[:, 0], teacher[:, 1] = 1000.0, 1000.0
    output = kd(student, teacher, torch.tensor([2, 3]), kd_weight=weight, label_weight=weight)
    largest = float(output.grad.float().abs().max())
    assert 65504 / 4 < largest <= 65504
    assert float(output.grad_scale).hex().split("p")[0] == "0x1.0000000000000"
    assert relative_error(final_gradient(output), truth_gradient(student, teacher, torch.tensor([2, 3]), weight)) < 1e-3


def truth_gradient(student: Tensor, teacher: Tensor, labels: Tensor, weight: float) -> Tensor:
    return weight * truth(student, teacher, labels, label_weight=1.0).grad


def test_bfloat16_rounds_ties_to_even() -> None:
    # With weight w this gradient is (-w/2, w/2) exactly; the halves chosen lie between two bf16 values.
    student, teacher = torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([[1e4, 0.0]])
    for half in (1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 512):
        output = kd(student, teacher, kd_weight=2 * half)
        assert torch.equal(output.grad, torch.tensor([[-half, half]]).bfloat16())


def strided(values: Tensor, layout: str) -> Tensor:
    rows, classes = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "every other column":
        return torch.stack([values, torch.full_like(values, float("nan"))], dim=2).flatten(1)[:, ::2]
    if layout == "wide rows":
        return torch.cat([values, torch.full((rows, 3), float("nan"), dtype=values.dtype)], dim=1)[:, :classes]
    if layout == "odd address":
        return torch.cat([torch.zeros(1, dtype=values.dtype), values.flatten()])[1:].view(rows, classes)
    return values[:1].expand(rows, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transposed", "every other column", "wide rows", "odd address", "one row"])
def test_strides(layout: str, dtype: torch.dtype) -> None:
    student, teacher = logits(7, 45).to(dtype), logits(7, 45, seed=1).to(dtype)
    for s, t in ((strided(student, layout), teacher), (student, strided(teacher, layout))):
        output, expected = kd(s, t), kd(s.contiguous(), t.contiguous())
        assert output.grad.is_contiguous()
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.grad, expected.grad)


@pytest.mark.parametrize("dimension", [0, 1])
def test_strides_of_more_elements_than_32_bits_count(
    dimension: int, far_apart: Callable[[Tensor, int], Tensor]
) -> None:
    student, cache = logits(3, 4).half(), logits(5, 4, seed=1).half()
    rows = torch.tensor([4, 0, 3])
    expected = kd(student, cache, None, rows)
    for s, t in ((far_apart(student, dimension), cache), (student, far_apart(cache, dimension))):
        output = kd(s, t, None, rows)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.grad, expected.grad)


def test_teacher_rows_are_read_in_place() -> None:
    student, cache = logits(6, 50), logits(40, 50, seed=1)
    rows = torch.tensor([39, 0, 0, 17, 39, 5])
    output, expected = kd(student, cache, None, rows), kd(student, cache[rows])
    assert torch.equal(output.grad, expected.grad)
    rows_apart = torch.stack([rows, rows], dim=1)[:, 0]  # stride 2
    assert torch.equal(kd(student, cache, None, rows_apart).grad, expected.grad)


@pytest.mark.parametrize("classes", [16_384, 16_381, 100_003])
def test_large_gradients_are_streamed_to_the_same_bits(classes: int) -> None:
    # From 16 MiB on they are written past the cache, wherever their rows begin; a row alone is not.
    rows = 2**23 // classes + 4
    student, teacher, labels = logits(rows, classes), logits(rows, classes, seed=1), torch.arange(rows)
    student[1] += 30 * (torch.arange(classes) == 5)  # by log-sum-exp
    student[rows // 2, -3] += 60  # visited twice
    labels[2] = -100
    options = {"reduction": "sum", "label_weight": 1.0}
    cwtm = {"weight_by": "teacher_max", "ignore_index": -100, "need_grad": True}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        student_, one = (
            student.to(dtype),
            torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        )
        large = kd(student_, teacher, labels, **options)
        unlabelled = kd(student_, teacher, reduction="none")
        weighted = native.cwtm(student_, teacher, labels, None, one, None, **cwtm)
        assert not weighted.grad[2].any()
        for row in (0, 1, 3, rows // 2, rows - 1):
            one_row = slice(row, row + 1)
            alone = kd(student_[one_row], teacher[one_row], labels[one_row], **options)
            assert torch.equal(large.grad[row], alone.grad[0])
            alone = kd(student_[one_row], teacher[one_row], reduction="none")
            assert torch.equal(unlabelled.grad[row], alone.grad[0])
            assert torch.equal(unlabelled.loss[row], alone.loss[0])
            alone = native.cwtm(student_[one_row], teacher[one_row], labels[one_row], None, one, None, **cwtm)
            assert torch.equal(weighted.grad[row], alone.grad[0])


def test_forward_only_gives_the_same_values() -> None:
    student, teacher, labels = logits(9, 77), logits(9, 77, seed=1), torch.arange(9)
    for dtype in (torch.float32, torch.float16):
        with_grad = kd(student.to(dtype), teacher, labels, label_weight=1.0, divergence="ce")
        without = kd(student.to(dtype), teacher, labels, label_weight=1.0, divergence="ce", need_grad=False)
        assert without.grad is None
        assert without.grad_scale is None
        assert torch.equal(with_grad.loss, without.loss)


def test_outputs_share_no_memory_and_carry_no_graph() -> None:
    student = logits(4, 10).half().requires_grad_()
    output = kd(student, logits(4, 10, seed=1).requires_grad_(), torch.arange(4), reduction="none")
    storages = [tensor.untyped_storage().data_ptr() for tensor in output]
    assert len(set(storages)) == 5
    assert not any(tensor.requires_grad for tensor in output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_and_all_ignored(dtype: torch.dtype) -> None:
    empty = kd(logits(0, 5).to(dtype), logits(0, 5))
    assert float(empty.loss) == 0
    assert empty.grad.shape == (0, 5)
    ignored = kd(torch.full((3, 5), float("nan"), dtype=dtype), logits(3, 5), torch.full((3,), -100))
    assert float(ignored.loss) == 0
    assert not ignored.grad.any()
    if dtype == torch.float16:
        assert empty.grad_scale.isfinite()
        assert ignored.grad_scale.isfinite()


def test_indices_out_of_range_are_named() -> None:
    student, teacher = logits(4, 5), logits(3, 5)
    with pytest.raises(ValueError, match=r"labels: 5 in row 2 is out of range for 5 classes \(ignore_index is -1\)"):
        kd(student, student, torch.tensor([0, -1, 5, 9]), ignore_index=-1)
    with pytest.raises(ValueError, match=r"labels: -2 in row 0"):
        kd(student, student, torch.tensor([-2, 0, 0, 0]), ignore_index=-1)
    with pytest.raises(ValueError, match="teacher_rows: 3 in row 1 is out of range for 3 teacher rows"):
        kd(student, teacher, None, torch.tensor([0, 3, 0, 0]))
    with pytest.raises(ValueError, match=f"teacher_rows: {-(2**62)} in row 3"):
        kd(student, teacher, None, torch.tensor([0, 1, 2, -(2**62)]))
    kd(student, teacher, torch.tensor([0, -100, 0, 0]), torch.tensor([0, 3, 0, 0]))  # an ignored row is not read


def test_a_term_without_weight_is_left_out() -> None:
    student, teacher = logits(2, 6), logits(2, 6, seed=1)
    teacher[0, 0] = float("nan")
    output = kd(student, teacher, torch.tensor([1, 2]), kd_weight=0.0, label_weight=1.0)
    assert output.loss.isfinite()
    assert output.grad.isfinite().all()
    assert output.kd.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scale_grad(dtype: torch.dtype) -> None:
    grad = logits(7, 37).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    by = torch.tensor(0.3, dtype=acc)
    expected = (grad.to(acc) * by).to(dtype)
    scaled = grad.clone()
    assert native.scale_grad_(scaled, by, None) is scaled
    assert torch.equal(scaled, expected)
    each = torch.rand(7, dtype=acc)
    assert torch.equal(native.scale_grad_(grad.clone(), each, None), (grad.to(acc) * each[:, None]).to(dtype))
    expanded = by.expand(7)  # stride 0, as autograd hands it over
    assert torch.equal(native.scale_grad_(grad.clone(), expanded, None), expected)
    doubled = (grad.to(acc) * 0.6).to(dtype)
    assert torch.equal(native.scale_grad_(grad.clone(), by, torch.tensor(2.0, dtype=acc)), doubled)
    # Times 1 it is not even read: multiplying would have made this signalling NaN a quiet one.
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
    infinity = torch.tensor([float("inf")], dtype=dtype).view(words)
    signalling = (infinity + 1).expand(1, 37).contiguous().view(dtype)
    native.scale_grad_(signalling, torch.tensor(4.0, dtype=acc), torch.tensor(0.25, dtype=acc))
    assert torch.equal(signalling.view(words), (infinity + 1).expand(1, 37))
