import itertools

import pytest
import torch
from reference_truth import KD, truth
from triton_truth import FAR_ERROR, GRADIENT_ERROR, LOSS_ERROR, assert_close, found, logits

from ban_fast.backends import triton
from ban_fast.backends.triton import config

TEMPERATURES = [0.5, 1.0, 3.0, 4.0, 20.0]
REGIMES = ["random", "near", "shifted", "sharper", "outlier", "far"]
MORE = [2, 5, 7, 99, 100, 1000, 5000, 10240]
CLASSES = [2, 3, 5, 7, 10, 99, 100, 101, 1000]
"""One and many rows a program, exact powers of two and not, 16-byte rows and not."""
LARGE = [2050, 5000, 10240, 33000]
"""Several parts a row, up to the last that stays on the chip; and rows that are read twice."""

EDGES = [16, 17, 64, 128, 129, 256, 257, 512, 513, 1024, 1025]
"""On both sides of the limits in `config._SMALL`."""


def errors(regime: str) -> dict[str, float]:
    if regime == "far":
        return {"loss": FAR_ERROR, "gradient": FAR_ERROR}
    return {"loss": LOSS_ERROR, "gradient": GRADIENT_ERROR}


def rows_for(classes: int) -> int:
    return 5 if classes < 2000 else 2


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("classes", [3, 10, 101, 2050, 33000, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_kd_is_accurate(classes: int, regime: str, device: torch.device) -> None:
    tensors = (*logits(rows_for(classes), classes, regime), None, None)
    options = KD | {"reduction": "none", "temperature": 3.0 if regime == "shifted" else 1.0}
    assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options), **errors(regime))


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("classes", [*CLASSES, *EDGES, *LARGE, 10241, 70001])
def test_kd_is_accurate_at_every_temperature(classes: int, regime: str, device: torch.device) -> None:
    """Every number of classes at two of the temperatures, every regime at all of them."""
    labels = torch.arange(rows_for(classes)).clamp_max(classes - 1)
    tensors = (*logits(rows_for(classes), classes, regime, seed=1), labels, None)
    first = classes + REGIMES.index(regime)
    for turn, divergence in enumerate(("kl", "ce")):
        temperature = TEMPERATURES[(first + turn) % len(TEMPERATURES)]
        options = KD | {"reduction": "none", "temperature": temperature, "divergence": divergence}
        assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options), **errors(regime))


@pytest.mark.parametrize("classes", [2, 10, 100, 2050, pytest.param(33000, marks=pytest.mark.slow)])
def test_a_nearly_certain_label_keeps_its_digits(classes: int, device: torch.device) -> None:
    student, teacher = logits(4, classes, "random")
    labels = torch.tensor([0, classes - 1, 1, 0])
    student[0, 0] += 30
    student[1, -1] += 60
    student[2, 1] -= 40
    options = KD | {"kd_weight": 0.0, "label_weight": 1.0, "reduction": "none"}
    wanted = truth("kd", student, teacher, labels, None, **options)
    got = found("kd", (student, teacher, labels, None), device, **options)
    assert_close(got, wanted)
    assert got.grad is not None
    assert wanted.grad is not None
    own = torch.stack([got.grad, wanted.grad])[:, torch.arange(4), labels]
    assert torch.allclose(own[0], own[1], rtol=3e-6)  # -R / (1 + R), tiny beside q of the others


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("classes", [10, 101, 1000, pytest.param(33000, marks=pytest.mark.slow)])
def test_classes_that_only_the_student_finds(classes: int, flipped: bool, device: torch.device) -> None:
    """e^-24 to e^-86 of the teacher's peak, e^-0.5 to e^-4 of the student's, after the peak or before it."""
    student, teacher = logits(4, classes, "near")
    student[:, 1] = teacher[:, 1] = 14
    for place, below, share in ((classes // 2, 24.0, 0.5), (-2, 86.0, 2.0), (-1, 60.0, 4.0)):
        teacher[:, place], student[:, place] = 14 - below, 14 - share
    if flipped:
        student, teacher = student.flip(1), teacher.flip(1)
    for dtype, limit in ((torch.float32, FAR_ERROR), (torch.float16, 2**-10), (torch.float64, 1e-12)):
        tensors = (student.to(dtype), teacher.to(dtype), None, None)
        options = KD | {"reduction": "none", "kd_weight": 64.0}
        loss = 1e-12 if dtype == torch.float64 else FAR_ERROR
        got, wanted = found("kd", tensors, device, **options), truth("kd", *tensors, **options)
        assert_close(got, wanted, loss=loss, gradient=limit)


@pytest.mark.parametrize("student_type", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher_type", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_pair_of_dtypes(student_type: torch.dtype, teacher_type: torch.dtype, device: torch.device) -> None:
    for classes in (10, 101, 1025):
        student, teacher = logits(4, classes, "near")
        labels = torch.tensor([1, -100, 0, 2])
        tensors = (student.to(student_type), teacher.to(teacher_type), labels, None)
        options = KD | {"temperature": 2.0, "label_weight": 0.5, "kd_weight": 0.5}
        got, wanted = found("kd", tensors, device, **options), truth("kd", *tensors, **options)
        acc = torch.float64 if student_type == torch.float64 else torch.float32
        assert got.loss.dtype == got.kd.dtype == got.label.dtype == acc
        if acc == torch.float64:
            assert_close(got, wanted, loss=1e-12, gradient=1e-12)
            continue
        # The interpreter cuts bf16 off where a GPU rounds to nearest (test_triton_aot.py: cvt.rn).
        unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(student_type)
        assert_close(got, wanted, gradient=3e-6 if unit is None else unit if device.type == "cpu" else unit / 2)


@pytest.mark.parametrize("classes", [10, 100, 1000, 2050])
def test_any_strides(classes: int, device: torch.device) -> None:
    student, teacher = logits(4, classes, "near")
    labels, rows = torch.tensor([1, 0, -100, 1]), torch.tensor([2, 2, 0, 1])
    wide = torch.zeros(8, classes + 9)
    wide[::2, 5:-4] = student
    views = {
        "transposed": (student.T.contiguous().T, teacher.T.contiguous().T),
        "part of a wider matrix": (wide[::2, 5:-4], teacher),
        "one teacher row for all": (student, teacher[:1].expand(4, classes)),
        "every other class": (torch.stack([student, student], 2).flatten(1)[:, ::2], teacher),
    }
    options = KD | {"temperature": 3.0, "label_weight": 0.3}
    spread = torch.stack([labels, rows], 1)
    for view in views.values():
        tensors = (*view, spread[:, 0], spread[:, 1])
        on_device = tuple(t.to(device) for t in tensors)
        assert [t.stride() for t in on_device] == [t.stride() for t in tensors] or device.type != "cpu"
        assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options))


QUICK_WAYS = [("mean", False, "kl"), ("none", True, "ce")]
WAYS = itertools.product(("mean", "sum", "none"), (False, True), ("kl", "ce"))


@pytest.mark.parametrize(
    ("reduction", "scale_t2", "divergence"),
    [*QUICK_WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in WAYS if way not in QUICK_WAYS)],
)
def test_every_way_of_asking(reduction: str, scale_t2: bool, divergence: str, device: torch.device) -> None:
    labels, rows = torch.tensor([1, 0, -100, 1, 4]), torch.tensor([2, 2, 0, 1, 6])
    for classes in (7, 11000):
        student, _ = logits(5, classes, "random")
        _, teacher = logits(7, classes, "random")
        tensors = (student, teacher, labels, rows)
        options = KD | {"temperature": 2.5, "kd_weight": 0.7, "label_weight": 0.3, "reduction": reduction}
        options |= {"scale_t2": scale_t2, "divergence": divergence}
        assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options))
        forward = found("kd", tensors, device, **options | {"need_grad": False})
        assert forward.grad is None
        assert forward.grad_scale is None
        assert torch.equal(forward.loss, found("kd", tensors, device, **options).loss)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_term_without_weight_is_reported_and_left_out(weights: tuple[float, float], device: torch.device) -> None:
    student, teacher = logits(3, 10, "random")
    student[0, 3] = -torch.inf  # KL is infinite
    student[1, 2] = -torch.inf  # and here cross-entropy
    tensors = (student, teacher, torch.tensor([0, 2, 1]), None)
    options = KD | {"kd_weight": weights[0], "label_weight": weights[1], "reduction": "none"}
    got, wanted = found("kd", tensors, device, **options), truth("kd", *tensors, **options)
    assert_close(got, wanted)
    assert torch.isinf(got.kd[0])
    assert torch.isinf(got.label[1])


@pytest.mark.slow
def test_a_large_batch_is_counted_first(device: torch.device) -> None:
    rows, classes = 2100, 3
    assert rows > config.distill_plan(classes, aligned=False, double=False, permuted=False).counted_below
    student, teacher = logits(rows, classes, "random")
    labels = torch.where(torch.arange(rows) % 3 == 0, -100, 1)
    options = KD | {"label_weight": 0.5}
    tensors = (student, teacher, labels, None)
    assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options))


def test_few_programs_take_many_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MAX_PROGRAMS", 3)
    student, teacher = logits(50, 10, "random")
    labels = torch.where(torch.arange(50) % 4 == 0, -100, 3)
    for tensors in ((student, teacher, labels, None), (student, teacher, None, None)):
        for reduction in ("mean", "sum"):
            options = KD | {"label_weight": 0.5 if tensors[2] is not None else 0.0, "reduction": reduction}
            assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options))


def test_fp16_gradients_are_stored_as_large_as_fits(device: torch.device) -> None:
    for reduction, rows in (("mean", 6), ("sum", 6), ("none", 3)):
        student, teacher = (x.half() for x in logits(rows, 50, "random"))
        student[0, 0] += 30
        labels = torch.tensor([1] * rows)
        options = KD | {"label_weight": 3.0, "temperature": 4.0, "reduction": reduction}
        on_device = (student.to(device), teacher.to(device), labels.to(device), None)
        output = triton.kd(*on_device, **options)
        assert output.grad_scale is not None
        assert output.grad is not None
        mantissa, _ = torch.frexp(output.grad_scale.cpu())
        assert mantissa == 0.5  # a power of two
        assert 2**8 < output.grad.abs().max() < 2**15
        tensors = (student, teacher, labels, None)
        assert_close(found("kd", tensors, device, **options), truth("kd", *tensors, **options), gradient=2**-11)


def test_empty_and_ignored_batches_are_zero(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        empty = (torch.empty(0, 5, dtype=dtype), torch.randn(3, 5), None, torch.empty(0, dtype=torch.int64))
        output = found("kd", empty, device, **KD)
        assert output.loss == output.kd == output.label == 0
        assert output.grad is not None
        assert output.grad.shape == (0, 5)
        ignored = (torch.randn(4, 5).to(dtype), torch.randn(4, 5), torch.full((4,), 7), None)
        for reduction in ("mean", "sum"):
            options = KD | {"ignore_index": 7, "label_weight": 1.0, "reduction": reduction}
            output = found("kd", ignored, device, **options)
            assert output.loss == output.kd == output.label == 0
            assert output.grad is not None
            assert not output.grad.any()


def test_the_same_bits_every_time(device: torch.device) -> None:
    tensors = (*logits(9, 100, "random"), torch.arange(9), None)
    options = KD | {"label_weight": 1.0, "temperature": 3.0}
    first, second = found("kd", tensors, device, **options), found("kd", tensors, device, **options)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize("classes", [2, 10, 100, 2050, pytest.param(11000, marks=pytest.mark.slow)])
def test_equal_logits_are_exactly_nothing_and_no_divergence_is_negative(classes: int, device: torch.device) -> None:
    _, teacher = logits(4, classes, "random")
    options = KD | {"reduction": "none", "temperature": 3.0}
    same = found("kd", (teacher, teacher, None, None), device, **options)
    assert not same.kd.any()
    assert not same.grad.any()
    for size in (1e-7, 1e-6, 1e-5):  # below the rounding of some logits, and above
        student = teacher * (1 + size)
        assert (found("kd", (student, teacher, None, None), device, **options).kd >= 0).all()
