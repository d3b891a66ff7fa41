"""What the CUDA kernels owe, wherever they run: in the emulator on the CPU, and on a GPU."""

from typing import Any

import pytest
import torch
from reference_truth import KD, truth
from torch import Tensor

from ban_fast.backends import native_cuda, reference
from ban_fast.backends.interface import LossOutput

INF = float("inf")
CWTM: dict[str, Any] = {"weight_by": "teacher_max", "ignore_index": -100, "need_grad": True}

ROWS, CACHE = 5, 9
TEACHER_ROWS = [3, 1, 4, 1, 5]

ERROR = 1e-6
"""Of a loss, and of the norm of a gradient, in fp32: the difference form's 8e-7, and some ulps of what is before it."""
FAR_ERROR = 1e-5
"""Of both where a row goes by log-sum-exp."""
STORED = {torch.float32: ERROR, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2e-11}
"""Of the norm of a gradient as it is stored: half a unit in the last place is the most that rounding adds."""

CLASSES = (
    *(1, 2, 3, 7, 10, 16, 17, 31, 32, 33, 64, 65, 99, 100, 101, 128, 129, 257, 1000, 1024, 1025, 2049),
    pytest.param(10000, marks=pytest.mark.slow),
)
"""Around every limit between kernels, between DKPP's two permutations (99 and 100), and of a warp and a tile."""


def logits(classes: int, regime: str, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Student [rows, classes] and teacher [CACHE, classes], fp32, of which the student's rows learn TEACHER_ROWS."""
    generator = torch.Generator().manual_seed(classes)
    teacher = 2 * torch.randn(CACHE, classes, generator=generator)
    noise = torch.randn(rows, classes, generator=generator)
    if regime == "random":
        return 2 * noise, teacher
    near = teacher[torch.tensor(TEACHER_ROWS).repeat(rows)[:rows]] + 1e-3 * noise
    if regime == "near":  # a born-again student ends close to its teacher
        return near, teacher
    if regime == "shifted":
        return near + 100, teacher
    if regime == "outlier":  # the class that differences are measured from is the one that differs
        return near.scatter_add(1, near.argmax(1, keepdim=True), torch.full((rows, 1), 3.0)), teacher
    if regime == "dropped":  # two classes that the student all but drops
        near[:, :2] -= 60
        return near, teacher
    if regime == "leaping":  # one that it finds, far off
        teacher[:, 0] -= 100
        return near, teacher
    if (
        regime == "late"
    ):  # the peak is found first, and three such classes after it, with e^-0.5, e^-2 and e^-4 of the mass
        teacher[:, 1] = near[:, 1] = 14
        for place, below, share in ((classes // 2, 24.0, 0.5), (-2, 30.0, 2.0), (-1, 60.0, 4.0)):
            teacher[:, place], near[:, place] = 14 - below, 14 - share
        return near, teacher
    assert regime == "far"
    return 12 * noise, 12 * teacher


def labels_of(classes: int, rows: int = ROWS) -> Tensor:
    """One of them ignored."""
    labels = torch.arange(rows) * 7 % classes
    labels[2] = -100
    return labels


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


class Contract:
    """Subclasses say where: fixture `device`."""

    def found(self, name: str, device: torch.device, *tensors: Any, **options: Any) -> LossOutput:
        """On `device`, results on the CPU, with the scale of an fp16 gradient."""
        there = [value.to(device) if isinstance(value, Tensor) else value for value in tensors]
        loss, kd, label, grad, scale = getattr(native_cuda, name)(*there, **options)
        outputs = [None if value is None else value.cpu() for value in (loss, kd, label, grad, scale)]
        if outputs[4] is not None:
            outputs[3] = outputs[3].double() * outputs[4].double()
        return LossOutput(*outputs)

    def check(
        self,
        name: str,
        device: torch.device,
        *tensors: Any,
        value: float = ERROR,
        gradient: float | None = None,
        **options: Any,
    ) -> LossOutput:
        got, wanted = self.found(name, device, *tensors, **options), truth(name, *tensors, **options)
        for a, b in zip(got[:3], wanted[:3], strict=True):
            assert a is not None
            assert torch.allclose(a.double(), b.double(), rtol=value, atol=1e-14, equal_nan=True), (name, a, b)
        assert (got.kd >= 0).all()
        if options["need_grad"]:
            assert got.grad is not None
            assert wanted.grad is not None
            limit = STORED[tensors[0].dtype] if gradient is None else gradient
            assert relative(got.grad, wanted.grad) <= limit, (name, options)
        return got

    @pytest.mark.parametrize("regime", ["random", "near"])
    @pytest.mark.parametrize("classes", CLASSES)
    def test_kd(self, device: torch.device, classes: int, regime: str) -> None:
        student, teacher = logits(classes, regime)
        rows = torch.tensor(TEACHER_ROWS)
        options: dict[str, Any] = {**KD, "temperature": 3.5, "kd_weight": 0.7, "label_weight": 0.3}
        self.check("kd", device, student, teacher, labels_of(classes), rows, **options)
        self.check("kd", device, student, teacher, None, rows, **KD)

    @pytest.mark.parametrize("regime", ["shifted", "outlier", "dropped", "leaping"])
    @pytest.mark.parametrize("classes", [3, 100, 600, 4000])
    def test_kd_where_the_student_is_odd(self, device: torch.device, classes: int, regime: str) -> None:
        student, teacher = logits(classes, regime)
        # A step of fp32 at 100 is 7.6e-6, of which TwoSum finds all, but the truth's float64 exp of such logits not.
        self.check("kd", device, student, teacher, None, torch.tensor(TEACHER_ROWS), **KD, gradient=2 * ERROR)

    @pytest.mark.parametrize("regime", ["near", "shifted", "dropped", "leaping", "late", "far"])
    @pytest.mark.parametrize("classes", [10, 128, 129, 1000])
    def test_kd_in_fp64(self, device: torch.device, classes: int, regime: str) -> None:
        """Rows of more than 128 classes are read twice. The truth is no better than these are."""
        student, teacher = (x.double() for x in logits(classes, regime))
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        options = {**KD, "label_weight": 0.3, "reduction": "none"}
        self.check("kd", device, student, teacher, labels, rows, **options, value=STORED[torch.float64])
        self.check(
            "dkpp", device, student, teacher, labels, None, 5, rows, seed=2, **options, value=STORED[torch.float64]
        )

    @pytest.mark.parametrize("classes", [2, 100, 600, 4000])
    def test_kd_far_off(self, device: torch.device, classes: int) -> None:
        student, teacher = logits(classes, "far")
        options = {**KD, "label_weight": 0.5, "divergence": "ce", "reduction": "none"}
        tensors = (student, teacher, labels_of(classes), torch.tensor(TEACHER_ROWS))
        self.check("kd", device, *tensors, **options, value=FAR_ERROR, gradient=FAR_ERROR)

    @pytest.mark.parametrize("classes", [10, 100, 300, 4000])
    def test_kd_of_classes_masked_by_the_lowest_number(self, device: torch.device, classes: int) -> None:
        """Their logits are 1e38 apart, and the teacher's probability is 0."""
        for regime in ("near", "random"):
            student, teacher = logits(classes, regime)
            student[:, 1:4], teacher[:, 1:4] = torch.finfo(torch.float32).min, torch.tensor([-1e4, -1e9, -1e30])
            self.check(
                "kd", device, student, teacher, None, torch.tensor(TEACHER_ROWS), **KD, value=1e-4, gradient=1e-5
            )

    @pytest.mark.parametrize("classes", CLASSES)
    def test_dkpp(self, device: torch.device, classes: int) -> None:
        student, teacher = logits(classes, "random")
        ids = torch.arange(ROWS) * 1_000_003 - 7
        keyed = (ids, torch.tensor(2**40 + 5), torch.tensor(TEACHER_ROWS))
        options: dict[str, Any] = {**KD, "temperature": 3.5, "label_weight": 0.3}
        self.check("dkpp", device, student, teacher, labels_of(classes), *keyed, seed=-3, **options)

    @pytest.mark.parametrize("classes", CLASSES)
    def test_cwtm(self, device: torch.device, classes: int) -> None:
        student, teacher = logits(classes, "random")
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        self.check("cwtm", device, student, teacher, labels, None, None, rows, **CWTM)
        by_label = {**CWTM, "weight_by": "teacher_label"}
        self.check("cwtm", device, student, teacher, labels, None, None, rows, **by_label)
        normalizer = torch.tensor(5.0)
        self.check("cwtm", device, student, teacher, labels, None, normalizer, rows, **by_label)
        confidence = torch.rand(CACHE)
        self.check("cwtm", device, student, None, labels, confidence, None, rows, **CWTM)
        self.check("cwtm", device, student, None, labels, confidence, normalizer, rows, **CWTM)

    @pytest.mark.parametrize("divergence", ["kl", "ce"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("classes", [10, 300, 1500])
    def test_reductions(self, device: torch.device, classes: int, reduction: str, divergence: str) -> None:
        student, teacher = logits(classes, "random")
        options = {**KD, "label_weight": 0.5, "reduction": reduction, "divergence": divergence, "scale_t2": False}
        tensors = (student, teacher, labels_of(classes), torch.tensor(TEACHER_ROWS))
        whole = self.check("kd", device, *tensors, **{**options, "temperature": 2.0})
        forward = self.found("kd", device, *tensors, **{**options, "temperature": 2.0, "need_grad": False})
        assert forward.grad is None
        assert torch.equal(forward.loss, whole.loss)

    @pytest.mark.parametrize("teacher_type", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("student_type", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("classes", [10, 300, pytest.param(1101, marks=pytest.mark.slow), 1536])
    def test_types(
        self, device: torch.device, classes: int, student_type: torch.dtype, teacher_type: torch.dtype
    ) -> None:
        student, teacher = logits(classes, "random")
        student, teacher, rows = student.to(student_type), teacher.to(teacher_type), torch.tensor(TEACHER_ROWS)
        acc = torch.float64 if student_type == torch.float64 else torch.float32
        value = 1e-10 if acc == torch.float64 else ERROR
        labels = labels_of(classes)
        # What an fp64 teacher has beyond fp32 is lost to an fp32 student's arithmetic.
        known = teacher if acc == torch.float64 else teacher.float()
        options = {**KD, "temperature": 3.5, "label_weight": 0.3}
        got = self.found("kd", device, student, teacher, labels, rows, **options)
        wanted = truth("kd", student, known, labels, rows, **options)
        assert got.loss.dtype == acc
        assert relative(got.loss, wanted.loss) <= value
        assert got.grad is not None
        assert wanted.grad is not None
        assert relative(got.grad, wanted.grad) <= STORED[student_type]
        key = (labels, None, 11, rows)
        got = self.found("dkpp", device, student, teacher, *key, seed=5, **options)
        wanted = truth("dkpp", student, known, *key, seed=5, **options)
        assert relative(got.loss, wanted.loss) <= value
        self.check("cwtm", device, student, known, labels, None, None, rows, **CWTM, value=value)

    @pytest.mark.parametrize("offset", range(8))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("classes", [100, 1029, pytest.param(1600, marks=pytest.mark.slow)])
    def test_any_alignment(self, device: torch.device, classes: int, dtype: torch.dtype, offset: int) -> None:
        """Rows that begin anywhere within 16 bytes: all alike, or the student's elsewhere than the teacher's."""
        student, teacher = logits(classes, "random")
        for other in {offset, 3}:
            memory = torch.full((2, ROWS * classes + 16), INF, dtype=dtype)
            z = memory[0, offset:][: ROWS * classes].view(ROWS, classes).copy_(student)
            t = memory[1, other:][: ROWS * classes].view(ROWS, classes).copy_(teacher[:ROWS])
            memory = memory.to(device)
            there = (
                memory[0, offset:][: ROWS * classes].view(ROWS, classes),
                memory[1, other:][: ROWS * classes].view(ROWS, classes),
            )
            got = native_cuda.kd(*there, None, None, **KD)
            wanted = truth("kd", z, t, None, None, **KD)
            assert got.grad is not None
            assert wanted.grad is not None
            assert relative(got.loss.cpu(), wanted.loss) <= ERROR
            assert relative(got.grad.cpu(), wanted.grad) <= STORED[dtype]

    @pytest.mark.parametrize("classes", [10, 300, 1500])
    def test_any_strides(self, device: torch.device, classes: int) -> None:
        student, teacher = logits(classes, "random")
        teacher = teacher[:ROWS]
        wanted = truth("kd", student, teacher, None, None, **KD)
        columns = student.t().contiguous().t(), teacher.t().contiguous().t()
        rows = torch.cat([student, student], 1)[:, :classes], torch.cat([teacher, teacher], 1)[:, :classes]
        for z in (student, columns[0], rows[0], student.flip(0).flip(0)):
            for t in (teacher, columns[1], rows[1], teacher.repeat_interleave(2, 0)[::2]):
                got = native_cuda.kd(placed(z, device), placed(t, device), None, None, **KD)
                assert got.grad is not None
                assert got.grad.is_contiguous()
                assert wanted.grad is not None
                assert relative(got.grad.cpu(), wanted.grad) <= ERROR

    @pytest.mark.parametrize("classes", [10, 300, 1500])
    def test_corners(self, device: torch.device, classes: int) -> None:
        """-inf in one or both, 1e4, a row of -inf, NaN: as the reference has them, row by row."""
        student, teacher = logits(classes, "random", CACHE)
        student[:, 5] = teacher[:, 5] = -INF
        teacher[1, 6], student[2, 6] = -INF, -INF
        student[3] = 1e4 * student[3].sign()
        teacher[4] *= 1e4
        student[5], teacher[6], student[7, 0], teacher[8, 1] = -INF, -INF, float("nan"), float("nan")
        labels = torch.arange(CACHE) % 4
        for options in ({}, {"divergence": "ce"}, {"label_weight": 0.5}, {"kd_weight": 0.0, "label_weight": 1.0}):
            whole = {**KD, "reduction": "none", **options}
            tensors = (student, teacher, labels, None)
            got, wanted = self.found("kd", device, *tensors, **whole), truth("kd", *tensors, **whole)
            for a, b in zip(got[:3], wanted[:3], strict=True):
                assert a is not None
                assert torch.allclose(a.double(), b.double(), rtol=FAR_ERROR, equal_nan=True), (options, a, b)
            assert got.grad is not None
            assert wanted.grad is not None
            assert torch.allclose(got.grad.double(), wanted.grad, rtol=1e-4, atol=FAR_ERROR, equal_nan=True), options

    @pytest.mark.parametrize("classes", [10, 300, 1500])
    def test_indices_out_of_range(self, device: torch.device, classes: int) -> None:
        student, teacher = logits(classes, "random")
        wrong = torch.tensor([0, classes, -1, 2**40, 1])
        rows = torch.tensor([0, 1, 99, -1, 2**40])
        none = {**KD, "reduction": "none", "label_weight": 1.0}
        nothing = torch.tensor([False, True, True, True, False])
        got = self.found("kd", device, student, teacher, wrong, None, **none)
        assert torch.equal(got.loss.isnan(), nothing)
        assert got.grad is not None
        assert torch.equal(got.grad.abs().sum(1) == 0, nothing)
        nothing = torch.tensor([False, False, True, True, True])
        got = self.found("dkpp", device, student, teacher, None, None, 0, rows, seed=0, **none)
        assert torch.equal(got.loss.isnan(), nothing)
        assert not got.label.isnan().any()
        assert got.grad is not None
        assert torch.equal(got.grad.abs().sum(1) == 0, nothing)
        got = self.found("cwtm", device, student, teacher, wrong, None, None, None, **CWTM)
        assert got.loss.isnan()
        assert got.grad is not None
        assert not got.grad[1:4].any()
        assert got.grad[0].any()
        # Nothing of an ignored row is looked at.
        ignored = torch.tensor([0, 1, -100, -100, -100])
        student[2:] = float("nan")
        got = self.found("kd", device, student, teacher, ignored, rows, **none)
        assert not got.loss.isnan().any()
        there = native_cuda.dkpp_targets(teacher.to(device), None, 0, rows.to(device), seed=0, temperature=1.0)
        assert torch.equal(there.cpu().isnan().all(1), nothing)

    def test_no_rows(self, device: torch.device) -> None:
        student, teacher = logits(10, "random")
        for dtype in (torch.float32, torch.float16):
            got = self.found("kd", device, student[:0].to(dtype), teacher, None, torch.tensor([]).long(), **KD)
            assert float(got.loss) == 0
            assert got.grad is not None
            assert got.grad.shape == (0, 10)
            ignored = torch.full((ROWS,), -100)
            for name, key in (("kd", ()), ("cwtm", ())):
                arguments = (ignored, None) if name == "kd" else (ignored, None, None, None)
                options = KD if name == "kd" else CWTM
                got = self.found(name, device, student.to(dtype), teacher[:ROWS], *arguments, *key, **options)
                assert float(got.loss) == 0
                assert got.grad is not None
                assert not got.grad.any()

    @pytest.mark.parametrize("classes", [3, pytest.param(300, marks=pytest.mark.slow)])
    def test_many_rows(self, device: torch.device, classes: int) -> None:
        """More than every block counts itself, and with 300 classes more than there are blocks."""
        rows = 4100
        generator = torch.Generator().manual_seed(1)
        student, teacher = (torch.randn(rows, classes, generator=generator) for _ in range(2))
        labels = torch.randint(-1, classes, (rows,), generator=generator)
        options = {"ignore_index": -1}
        self.check("kd", device, student, teacher, labels, None, **{**KD, **options, "label_weight": 0.5})
        self.check("cwtm", device, student, teacher, labels, None, None, None, **{**CWTM, **options})

    @pytest.mark.parametrize("classes", [1, 2, 3, 98, 99, 100, 101, 129, 1001, 5000])
    def test_the_permutation_is_everybodys(self, device: torch.device, classes: int) -> None:
        kept, ids = torch.tensor([0, 0, classes - 1, classes // 2]), torch.tensor([0, -5, 2**62, 7])
        for step in (0, torch.tensor(-(2**40))):
            for names in (ids, None):
                options = {"seed": -3, "num_classes": classes}
                there = [x.to(device) if isinstance(x, Tensor) else x for x in (kept, names, step)]
                got = native_cuda.dkpp_permutation(*there, **options)
                assert torch.equal(got.cpu(), reference.dkpp_permutation(kept, names, step, **options))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("classes", [1, 10, 100, 1000, 3001])
    def test_targets(self, device: torch.device, classes: int, dtype: torch.dtype) -> None:
        _, teacher = logits(classes, "random")
        teacher = teacher.to(dtype)
        rows = torch.tensor(TEACHER_ROWS)
        options = {"seed": 3, "temperature": 2.5}
        got = native_cuda.dkpp_targets(teacher.to(device), None, 4, rows.to(device), **options)
        wanted = reference.dkpp_targets(teacher.double(), None, 4, rows, **options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative(got.cpu(), wanted) <= (1e-14 if dtype == torch.float64 else 2e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("classes", [3, 1000, 20000])
    def test_scaling(self, device: torch.device, classes: int, dtype: torch.dtype) -> None:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.randn(ROWS, classes).to(dtype)
        scale = torch.tensor(0.25, dtype=acc)
        each = torch.tensor([1.0, 0.3, 4.0, -7.0, 0.0], dtype=acc)
        strided = torch.stack([each, -each], 1)[:, 0]
        one = torch.tensor(1.0, dtype=acc)
        for factor in (torch.tensor(0.3, dtype=acc), each, strided, one, one.expand(ROWS)):
            for by in (None, scale):
                stored = grad.clone().to(device)
                got = native_cuda.scale_grad_(stored, placed(factor, device), None if by is None else by.to(device))
                assert got is stored
                wanted = reference.scale_grad_(grad.clone(), factor, by)
                assert torch.equal(got.cpu(), wanted)

    def test_bits_are_the_same_again(self, device: torch.device) -> None:
        for classes in (10, 100, 700, 3000):
            student, teacher = logits(classes, "random")
            first = self.found("kd", device, student, teacher, None, torch.tensor(TEACHER_ROWS), **KD)
            again = self.found("kd", device, student, teacher, None, torch.tensor(TEACHER_ROWS), **KD)
            assert torch.equal(first.loss, again.loss)
            assert first.grad is not None
            assert again.grad is not None
            assert torch.equal(first.grad, again.grad)


def placed(x: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` with the same strides, which .to() keeps of dense tensors alone."""
    if 0 in x.stride():
        return x[:1].to(device).expand(x.shape)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((size,), INF, dtype=x.dtype)
    memory.as_strided(x.shape, x.stride()).copy_(x)
    return memory.to(device).as_strided(x.shape, x.stride())
