"""Every kernel compiles for sm_80 and sm_90 as the launchers launch it, without a GPU, and no register is spilled.

The full product of what a launch depends on has tens of thousands of points. Registers are decided by the plan, the
loss, the arithmetic and the architecture, so the grid holds every plan of config.py with each loss that uses it, on one
or the other architecture; all else is drawn beside these so that every two of its values come together somewhere. The
plans that hold most in registers are there on both architectures, with everything asked for.
"""

import itertools
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton_aot
from torch import Tensor

from ban_fast.backends import triton
from ban_fast.backends.triton import config, launch

LEAST_SHARED = 101_376
"""Bytes of shared memory that a program can have on every GPU of compute capability 8.0 or more: 8.6, 8.9, 12.0."""
ROWS = 600
"""More than some plans count by themselves (`Plan.counted_below`), so that there is a count to launch."""
FLOAT, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16


class Ask(NamedTuple):
    """What a call of KD or DKPP depends on, besides classes, loss and architecture."""

    dtypes: tuple[torch.dtype, torch.dtype] = (FLOAT, FLOAT)
    labels: bool = True
    divergence: str = "ce"
    temperature: float = 3.0
    reduction: str = "mean"
    weights: tuple[float, float] = (0.7, 0.3)
    teacher_rows: bool = True
    sample_ids: bool = True
    step: int | Tensor = 3
    layout: str = "contiguous"
    need_grad: bool = True


CHOICES: dict[str, list[Any]] = {
    "dtypes": [(FLOAT, FLOAT), (BRAIN, BRAIN), (HALF, FLOAT), (DOUBLE, DOUBLE), (FLOAT, BRAIN)],
    "labels": [True, False],
    "divergence": ["kl", "ce"],
    "temperature": [1.0, 2.0, 3.0],
    "reduction": ["mean", "sum", "none"],
    "weights": [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)],
    "teacher_rows": [True, False],
    "sample_ids": [True, False],
    "step": [3, torch.tensor(3)],
    "layout": ["contiguous", "every other class", "unaligned"],
    "need_grad": [True, False],
}
ALIGNED = [16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 10240, 32000]
"""Each a plan of its own at fp32: the limits of `config._SMALL`, 3 to 5 parts for 4, 8 and 16 warps, online."""
UNALIGNED = [2, 3, 10, 100, 101, 999, 2047, 4095, 33001]
"""Rows of odd length, which are not aligned, and few classes: with these every kind of permutation is there."""
LARGEST = [2560, 5120, 10240, 32000]


def logits(classes: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "every other class":
        return torch.empty(ROWS, 2 * classes, dtype=dtype)[:, ::2]
    if layout == "unaligned":
        return torch.empty(ROWS * classes + 1, dtype=dtype)[1:].view(ROWS, classes)
    return torch.empty(ROWS, classes, dtype=dtype)


def index(wanted: bool = True) -> Tensor | None:
    return torch.empty(ROWS, dtype=torch.int64) if wanted else None


def distill(loss: str, classes: int, ask: Ask) -> None:
    """Launches KD or DKPP."""
    tensors = (
        logits(classes, ask.dtypes[0], ask.layout),
        logits(classes, ask.dtypes[1], ask.layout),
        index(ask.labels),
    )
    options: dict[str, Any] = {
        "temperature": ask.temperature,
        "kd_weight": ask.weights[0],
        "label_weight": ask.weights[1] if ask.labels else 0.0,
        "divergence": ask.divergence,
        "scale_t2": True,
        "ignore_index": -100,
        "reduction": ask.reduction,
        "need_grad": ask.need_grad,
    }
    if loss == "kd":
        triton.kd(*tensors, index(ask.teacher_rows), **options)
    else:
        triton.dkpp(*tensors, index(ask.sample_ids), ask.step, index(ask.teacher_rows), seed=5, **options)


def cwtm(classes: int, dtype: torch.dtype, source: str, rows: int = ROWS, teacher_rows: bool = True) -> None:
    student, labels = torch.empty(rows, classes, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    confidence = torch.empty(ROWS) if source == "given" else None
    normalizer = torch.empty((), dtype=launch.arithmetic(student)[0]) if source != "teacher_max" else None
    triton.cwtm(
        student,
        None if source == "given" else torch.empty(ROWS, classes, dtype=dtype),
        labels,
        confidence,
        normalizer,
        torch.empty(rows, dtype=torch.int64) if teacher_rows else None,
        weight_by="teacher_label" if source == "teacher_label" else "teacher_max",
        ignore_index=-100,
        need_grad=True,
    )


def proven(capability: int, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Compiles what the call launches, prints what that takes, and fails on a spill."""
    with triton_aot.compiling(capability, monkeypatch) as kernels:
        call()
    assert kernels
    for kernel in kernels:
        registers, spilled = kernel.resources()
        print(
            f"sm_{capability} {name}: {kernel.name} {kernel.options.get('num_warps', 4)} warps, {registers} registers, "
            f"{spilled} bytes spilled, {kernel.shared} bytes shared"
        )
        assert spilled == 0, (name, capability, kernel.name, kernel.options)
        limit = config.PREFETCH_SHARED if kernel.options.get("STAGES") == 2 else LEAST_SHARED
        assert kernel.shared <= limit, (name, kernel.name, kernel.shared)


QUICK: list[tuple[int, str, int, dict[str, Any]]] = [
    (90, "kd", 10, {"labels": False}),
    (90, "kd", 100, {"dtypes": (BRAIN, BRAIN), "divergence": "kl"}),
    (80, "kd", 1000, {"dtypes": (HALF, FLOAT), "reduction": "sum"}),
    (90, "kd", 10000, {"divergence": "kl"}),
    (80, "kd", 32000, {"divergence": "kl", "dtypes": (BRAIN, BRAIN)}),
    (90, "dkpp", 100, {"divergence": "kl", "step": torch.tensor(3)}),
    (80, "dkpp", 10000, {"divergence": "kl", "labels": False}),
]


def test_what_a_quick_look_at_the_kernels_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, loss, classes, ask in QUICK:
        proven(
            capability, lambda c=classes, w=loss, a=ask: distill(w, c, Ask(**a)), monkeypatch, f"{loss} {classes} {ask}"
        )
    proven(90, lambda: cwtm(1000, FLOAT, "teacher_max"), monkeypatch, "cwtm 1000")
    proven(80, lambda: cwtm(100, HALF, "given"), monkeypatch, "cwtm 100, confidence given")
    proven(90, lambda: scale(HALF, by_row=True), monkeypatch, "scale_grad_")


def asks(count: int) -> list[Ask]:
    """`count` combinations of CHOICES, drawn so that each pair of values is met as early as can be."""
    draw = random.Random(0)
    names = list(CHOICES)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(CHOICES[a]))
        for j in range(len(CHOICES[b]))
    }
    found = []
    for _ in range(count):
        tries = [{name: draw.randrange(len(CHOICES[name])) for name in names} for _ in range(60)]
        pairs = [{(a, t[a], b, t[b]) for a, b in itertools.combinations(names, 2)} for t in tries]
        best = max(range(len(tries)), key=lambda k: len(pairs[k] & missing))
        missing -= pairs[best]
        found.append(Ask(**{name: CHOICES[name][i] for name, i in tries[best].items()}))
    assert not missing, f"{len(missing)} pairs are in no combination"
    return found


def grid() -> list[tuple[int, str, int, Ask]]:
    """(compute capability, loss, classes, what is asked for)."""
    plans = [(loss, classes) for classes in ALIGNED + UNALIGNED for loss in ("kd", "dkpp")]
    points = [
        (80 if i % 2 else 90, loss, classes, ask)
        for i, ((loss, classes), ask) in enumerate(zip(plans, asks(len(plans)), strict=True))
    ]
    for i, classes in enumerate(LARGEST):  # everything asked for
        dtypes = (FLOAT, FLOAT) if i % 2 else (BRAIN, BRAIN)
        points += [(capability, "kd", classes, Ask(dtypes, divergence="kl")) for capability in (80, 90)]
    return points


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_no_plan_of_kd_or_dkpp_spills(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, loss, classes, ask in grid()[part::4]:
        proven(capability, lambda c=classes, w=loss, a=ask: distill(w, c, a), monkeypatch, f"{loss} {classes} {ask}")


@pytest.mark.slow
def test_no_plan_of_cwtm_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = itertools.cycle([90, 80])
    sources = itertools.cycle(["given", "teacher_max", "teacher_label"])
    dtypes = itertools.cycle([FLOAT, BRAIN, HALF, DOUBLE])
    # The limits of `config._SMALL`; 4, 8 and 16 warps with the most parts, rows aligned or not; online.
    for classes in (10, 32, 64, 100, 256, 512, 1024, 2047, 4095, 4096, 8191, 8192, 16384, 33000):
        capability, source, dtype = next(capabilities), next(sources), next(dtypes)
        call = lambda: cwtm(classes, dtype, source)  # noqa: B023, E731
        proven(capability, call, monkeypatch, f"cwtm {classes} {dtype} {source}")
    proven(80, lambda: cwtm(100, FLOAT, "given", rows=50, teacher_rows=False), monkeypatch, "cwtm, counted by the loss")


def scale(dtype: torch.dtype, *, by_row: bool) -> None:
    grad = torch.empty(ROWS, 1000, dtype=dtype)
    acc, _ = launch.arithmetic(grad)
    triton.scale_grad_(
        grad, torch.empty(ROWS if by_row else (), dtype=acc), torch.empty((), dtype=acc) if dtype == HALF else None
    )


@pytest.mark.slow
def test_the_small_kernels_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype in itertools.product((80, 90), (FLOAT, HALF, DOUBLE)):
        proven(capability, lambda d=dtype: scale(d, by_row=d != FLOAT), monkeypatch, f"scale_grad_ {dtype}")
    for i, classes in enumerate((2, 10, 100, 1000, 70000)):
        capability = 80 if i % 2 else 90
        argmax, step = torch.empty(ROWS, dtype=torch.int64), torch.tensor(1)

        def permutation(classes: int = classes, argmax: Tensor = argmax, step: Tensor = step) -> None:
            triton.dkpp_permutation(argmax, argmax, step, seed=1, num_classes=classes)

        def targets(
            classes: int = classes, argmax: Tensor = argmax, dtype: torch.dtype = (FLOAT, DOUBLE)[i % 2]
        ) -> None:
            triton.dkpp_targets(torch.empty(ROWS, classes, dtype=dtype), argmax, 1, argmax, seed=1, temperature=3.0)

        proven(capability, permutation, monkeypatch, f"dkpp_permutation {classes}")
        proven(capability, targets, monkeypatch, f"dkpp_targets {classes}")


def test_bf16_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts it off, which no test there can tell from a mistake."""
    with triton_aot.compiling(90, monkeypatch) as kernels:
        distill("kd", 100, Ask((BRAIN, BRAIN), divergence="kl"))
        scale(BRAIN, by_row=False)
    for kernel in kernels:
        if kernel.name in ("distill_kernel", "scale_kernel"):
            conversions = re.findall(r"cvt\.(\w+)\.(?:satfinite\.)?bf16x?2?\.f32", kernel.ptx)
            assert conversions
            assert set(conversions) == {"rn"}, kernel.name


def test_the_exact_differences_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """TwoSum holds in IEEE arithmetic alone: no approximate division, no flush of what is small beside z - t."""
    with triton_aot.compiling(90, monkeypatch) as kernels:
        distill("kd", 1000, Ask(divergence="kl", labels=False))
    (kernel,) = kernels
    assert "div.rn.f32" in kernel.ptx
    assert not re.search(r"div\.(full|approx)", kernel.ptx)
    assert len(re.findall(r"sub\.f32", kernel.ptx)) >= 9 * 8  # of TwoSum and of x = d - c, for a thread's 8 logits
    assert not re.search(r"sub\.(rn\.)?ftz", kernel.ptx)  # libdevice's logarithm has other instructions that flush


def test_several_logits_at_once_are_loaded_only_where_all_rows_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(student: Tensor, teacher: Tensor) -> tuple[int, int]:
        """Of 16 bytes, and of one logit, in the kernel's text."""
        with triton_aot.compiling(90, monkeypatch) as kernels:
            triton.kd(student, teacher, None, None, **KEYWORDS | {"ignore_index": -100, "label_weight": 0.0})
        (kernel,) = kernels
        return len(re.findall(r"ld\.global\.v4", kernel.ptx)), len(re.findall(r"ld\.global\.b32", kernel.ptx))

    rows, classes = 64, 1024
    aligned = torch.empty(rows, classes)
    shifted = torch.empty(rows * classes + 1)[1:].view(rows, classes)
    odd = torch.empty(rows, classes + 1)[:, :classes]
    wide, single = loads(aligned, aligned)
    assert wide > 0
    assert single == 0
    assert loads(shifted, shifted)[0] == 0
    assert loads(odd, aligned)[0] == 0
    assert 0 < loads(shifted, aligned)[0] < wide  # the teacher's


def test_integers_and_small_pointers_do_not_compile_kernels_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch size, step or place of the labels is the same kernel: captured calls cannot wait for a compiler."""
    labels = torch.empty(64, dtype=torch.int64)
    with triton_aot.compiling(90, monkeypatch) as kernels:
        for rows, step, offset in ((16, 1, 0), (33, 2, 1), (1, 7, 2), (48, 1 << 40, 3)):
            student = torch.empty(rows, 20)
            monkeypatch.setattr(launch, "counter", lambda _, o=offset: torch.zeros(8, dtype=torch.int32)[o])
            options = {**KEYWORDS, "ignore_index": -step}
            triton.dkpp(student, student, labels[offset : offset + rows], None, step, None, seed=step, **options)
    assert len(kernels) == 4
    assert len({triton_aot.specialisation(kernel) for kernel in kernels}) == 1


KEYWORDS: dict[str, Any] = {
    "temperature": 3.0,
    "kd_weight": 1.0,
    "label_weight": 1.0,
    "divergence": "kl",
    "scale_t2": True,
    "reduction": "sum",
    "need_grad": True,
}


def test_a_gpu_with_little_shared_memory_fetches_no_row_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_memory", lambda device: LEAST_SHARED)
    with triton_aot.compiling(80, monkeypatch) as kernels:
        distill("kd", 10000, Ask(divergence="kl", labels=False))
    assert [kernel.options["STAGES"] for kernel in kernels] == [1]
    assert kernels[0].shared <= LEAST_SHARED
    assert kernels[0].resources()[1] == 0
