import pytest
import torch
from reference_truth import truth
from torch import Tensor
from triton_truth import DKPP, FAR_ERROR, assert_close, found, logits

from ban_fast.backends import reference, triton
from ban_fast.backends.triton import config

SLOW = pytest.mark.slow
IDS = torch.tensor([0, 1, 4095, 2**31 - 1, 2**31, 2**32, 2**40 + 7, 2**63 - 1, -1, -(2**32), -(2**63)])
KEYS = [(0, 0), (-1, 5), (2**63 - 1, 2**31), (-(2**63), 2**63 - 1)]
CLASSES = [
    1,
    2,
    3,
    4,
    17,
    99,
    100,
    129,
    1001,
    *(pytest.param(n, marks=SLOW) for n in (16, 33, 65, 98, 101, 128, 257, 1000)),
]
"""No, one and two classes that move; both sides of the limits of the plans, of swap-or-not (99 classes and fewer) and
Feistel, of 10 rounds and 8; all but square numbers have points to walk over."""


def permutations(
    classes: int, ids: Tensor | None, step: int | Tensor, seed: int, device: torch.device, rows: int
) -> tuple[Tensor, Tensor]:
    """The Triton backend's, and the reference's."""
    argmax = torch.tensor([(7 * i + classes - 1) % classes for i in range(rows)])
    wanted = reference.dkpp_permutation(argmax, ids, step, seed=seed, num_classes=classes)
    on_device = [x.to(device) if isinstance(x, Tensor) else x for x in (argmax, ids, step)]
    return triton.dkpp_permutation(*on_device, seed=seed, num_classes=classes).cpu(), wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", CLASSES)
def test_the_permutation_has_the_reference_s_bits(classes: int, device: torch.device) -> None:
    seed, step = KEYS[classes % len(KEYS)]
    ids = IDS if classes < 64 else IDS[classes % 4 :: 4]
    got, wanted = permutations(classes, ids, step, seed, device, len(ids))
    assert got.dtype == torch.int64
    assert torch.equal(got, wanted)
    assert torch.equal(permutations(classes, ids, torch.tensor(step), seed, device, len(ids))[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2, 142, 10))
def test_the_permutation_has_the_reference_s_bits_at_every_small_size(first: int, device: torch.device) -> None:
    for classes in range(first, first + 10):
        got, wanted = permutations(classes, IDS[classes % 9 :][:2], 3, 1, device, 2)
        assert torch.equal(got, wanted), classes


@pytest.mark.slow
@pytest.mark.parametrize("classes", [998, 999, 2500, 9999, 10000, 65537, 65538, 70000, 2**21 + 3])
def test_the_permutation_has_the_reference_s_bits_at_large_sizes(classes: int, device: torch.device) -> None:
    """65,537: a table's entries begin to exceed a byte; 2^21: reciprocals end to be exact."""
    got, wanted = permutations(classes, IDS[-2:], 2**40, 7, device, rows=2)
    assert torch.equal(got, wanted)
    assert torch.equal(got.sort(1).values, torch.arange(classes).expand(2, classes))


@pytest.mark.slow
def test_rows_without_ids_are_numbered(device: torch.device) -> None:
    for classes, rows in ((10, 50), (200, 3)):
        got, wanted = permutations(classes, None, 4, 2, device, rows)
        assert torch.equal(got, wanted)
        assert torch.equal(permutations(classes, torch.arange(rows), 4, 2, device, rows)[0], got)


def keyed(rows: int, classes: int, teachers: int, regime: str = "random") -> tuple[Tensor, ...]:
    """Student, teacher, labels of which one is ignored, sample ids, step and teacher rows."""
    student, teacher = logits(max(rows, teachers), classes, regime)
    labels = torch.arange(rows) % classes
    labels[rows // 2] = -100
    teacher_rows = (torch.arange(rows) * 5 + 1) % teachers
    if regime == "near":
        student = student[teacher_rows]
    return student[:rows], teacher[:teachers], labels, IDS[:rows], torch.tensor(2**33 + 1), teacher_rows


@pytest.mark.parametrize("regime", ["random", *(pytest.param(name, marks=SLOW) for name in ("near", "far"))])
@pytest.mark.parametrize(
    "classes", [2, 10, 100, 129, 2050, 11000, *(pytest.param(n, marks=SLOW) for n in (3, 128, 1000))]
)
def test_dkpp_is_accurate(classes: int, regime: str, device: torch.device) -> None:
    tensors = keyed(7 if classes < 64 else 3, classes, 9, regime)
    options = DKPP | {"temperature": 3.0, "label_weight": 0.3, "seed": 11}
    bounds = {"loss": FAR_ERROR, "gradient": FAR_ERROR} if regime == "far" else {}
    assert_close(found("dkpp", tensors, device, **options), truth("dkpp", *tensors, **options), **bounds)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 31, 64, 100, 129, 300, 1025, 5000])
def test_dkpp_in_every_dtype(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Scratch is of the teacher's type: another than the student's, and the student's."""
    tensors = keyed(3, classes, 6)
    for teacher_type in (dtype, torch.float32):
        typed = (tensors[0].to(dtype), tensors[1].to(teacher_type), *tensors[2:])
        options = DKPP | {"temperature": 2.0, "divergence": "ce"}
        # A gradient that is stored in 16 bits is rounded; the interpreter cuts bf16 off.
        unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
        bounds = {"loss": 1e-12} if dtype == torch.float64 else {}
        assert_close(found("dkpp", typed, device, **options), truth("dkpp", *typed, **options), gradient=unit, **bounds)


@pytest.mark.parametrize("reduction", ["mean", *(pytest.param(name, marks=SLOW) for name in ("sum", "none"))])
@pytest.mark.parametrize("classes", [20, pytest.param(300, marks=SLOW)])
def test_every_reduction_of_dkpp(classes: int, reduction: str, device: torch.device) -> None:
    tensors = keyed(7 if classes < 64 else 3, classes, 9)
    options = DKPP | {"reduction": reduction, "scale_t2": False, "temperature": 1.5, "divergence": "ce", "seed": -3}
    got = found("dkpp", tensors, device, **options)
    assert_close(got, truth("dkpp", *tensors, **options))
    forward = found("dkpp", tensors, device, **options | {"need_grad": False})
    assert forward.grad is None
    assert torch.equal(forward.loss, got.loss)
    plain = (*tensors[:2], None, None, 2**33 + 1, tensors[5])
    assert_close(found("dkpp", plain, device, **options), truth("dkpp", *plain, **options))


@pytest.mark.parametrize("classes", [33, 200])
def test_strided_logits_of_dkpp(classes: int, device: torch.device) -> None:
    student, teacher, *rest = keyed(3, classes, 9)
    views = (student.T.contiguous().T, torch.stack([teacher, teacher], 2).flatten(1)[:, ::2])
    tensors = (*views, *rest)
    assert_close(found("dkpp", tensors, device, **DKPP), truth("dkpp", *tensors, **DKPP))


@pytest.mark.slow
def test_programs_that_take_many_rows_reuse_their_scratch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.Plan, "programs", lambda plan, rows, multiprocessors: min(2, -(-rows // plan.rows)))
    for classes, rows in ((10, 50), (101, 5), (140, 5)):
        student, teacher = logits(rows, classes, "random")
        tensors = (student, teacher, None, None, 1, None)
        options = DKPP | {"reduction": "none"}
        assert_close(found("dkpp", tensors, device, **options), truth("dkpp", *tensors, **options))


def test_what_is_kept_is_the_lowest_index_of_the_largest_logit_in_fp32(device: torch.device) -> None:
    for classes in (5, 150, 3000):
        teacher = torch.zeros(4, classes, dtype=torch.float64)
        teacher[0, 1:] = 1  # a tie of all but one
        teacher[1, [2, classes - 1]] = torch.tensor([5.0, 5.0 + 1e-12], dtype=torch.float64)  # a tie in fp32 alone
        teacher[2, -1] = 3
        teacher[3] = -torch.inf
        teacher[3, 3] = -7
        tensors = (teacher, None, 0, None)
        wanted = truth("dkpp_targets", *tensors, seed=1, temperature=1.0)
        got = found("dkpp_targets", tensors, device, seed=1, temperature=1.0)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        assert got[1, 2] == wanted[1].amax() or got[1, 2] >= got[1].amax() - 1e-11
        assert got[3, 3] == 1


@pytest.mark.parametrize("classes", [2, 129, *(pytest.param(n, marks=SLOW) for n in (10, 100, 1000, 5000))])
def test_targets(classes: int, device: torch.device) -> None:
    _, teacher = logits(6, classes, "random")
    rows = torch.tensor([5, 0, 0])
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-6)):
        typed = torch.stack([teacher, teacher], 2).flatten(1)[:, ::2].to(dtype)
        for tensors in ((typed, IDS[:3], torch.tensor(9), rows), (typed[:2], None, 2, None)):
            wanted = truth("dkpp_targets", *tensors, seed=4, temperature=3.0)
            got = found("dkpp_targets", tensors, device, seed=4, temperature=3.0)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=0)


def test_targets_of_rows_out_of_range_and_of_no_rows(device: torch.device) -> None:
    for classes in (10, 300):
        _, teacher = logits(3, classes, "random")
        teacher = teacher.to(device)
        rows = torch.tensor([2, 3, -1, 2**40, 0], device=device)
        got = triton.dkpp_targets(teacher, None, 0, rows, seed=0, temperature=1.0).cpu()
        assert got.isnan().all(1).tolist() == [False, True, True, True, False]
        assert not got[[0, 4]].isnan().any()
        assert triton.dkpp_targets(teacher, None, 0, rows[:0], seed=0, temperature=1.0).shape == (0, classes)
        assert triton.dkpp_permutation(rows[:0], None, 0, seed=0, num_classes=classes).shape == (0, classes)
