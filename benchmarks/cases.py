"""What is measured: cases, the bytes each must move, and which of them a run takes."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Objective = Literal["kd", "kd_labels", "cwtm", "cwtm_confidence", "dkpp"]
Dtype = Literal["fp32", "bf16"]
Regime = Literal["random", "near"]
Shape = tuple[int, int]

TITLE: dict[Objective, str] = {
    "kd": "KD",
    "kd_labels": "KD + labels",
    "cwtm": "CWTM",
    "cwtm_confidence": "CWTM, confidence known",
    "dkpp": "DKPP",
}
# [B, V] tensors that cannot but be moved: student and teacher are read, the gradient is written. CWTM needs no teacher
# where the teacher's confidence is known. The same for every provider, whatever it moves in fact.
UNITS: dict[Objective, int] = {"kd": 3, "kd_labels": 3, "cwtm": 3, "cwtm_confidence": 2, "dkpp": 3}
SIZE: dict[Dtype, int] = {"fp32": 4, "bf16": 2}

# CIFAR-10, CIFAR-100 at two batch sizes, Penn Treebank (32 x 35 tokens), a vocabulary of Llama 2's size.
SHAPES: tuple[Shape, ...] = ((128, 10), (128, 100), (512, 100), (1120, 10000), (512, 32000))
# More tokens of it, and Llama 3's vocabulary.
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (4096, 32000), (8192, 128256))
SMALL, LARGE, HUGE = (128, 100), (1120, 10000), (8192, 128256)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One objective at one shape, forward and backward from logits to d loss / d logits."""

    objective: Objective
    rows: int
    classes: int
    dtype: Dtype
    regime: Regime = "random"
    """Logits: "random" N(0, 2^2) on both sides, or "near": the student is its target plus N(0, 1e-3^2)."""

    @property
    def id(self) -> str:
        return f"{self.objective}-{self.rows}x{self.classes}-{self.dtype}-{self.regime}"

    @property
    def kind(self) -> tuple[Objective, int, int, Dtype]:
        """All but the regime: what a provider is built and compiled for."""
        return self.objective, self.rows, self.classes, self.dtype

    @property
    def title(self) -> str:
        return f"{TITLE[self.objective]} [{self.rows}, {self.classes}] {self.dtype}, {self.regime} logits"

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.classes * SIZE[self.dtype]

    @property
    def bytes(self) -> int:
        """The byte count behind every GB/s: fixed before anything ran."""
        return UNITS[self.objective] * self.tensor_bytes

    @property
    def byte_count(self) -> str:
        """That count in words."""
        factors = f"{UNITS[self.objective]} x {self.rows} x {self.classes} x {SIZE[self.dtype]} B"
        return f"{factors} = {self.bytes / 1e6:.4g} MB"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def everything(device: str) -> list[Case]:
    """Every case of `--full` on "cpu" or "cuda", those that targets are set for first."""
    shapes = GPU_SHAPES if device == "cuda" else SHAPES
    cases = []
    for objective in TITLE:
        for shape in shapes:
            cases += _both(objective, shape) if shape in (SMALL, LARGE) else [case_at(objective, shape, "fp32")]
            cases.append(case_at(objective, shape, "bf16"))
    return list(dict.fromkeys(targets(device) + cases))


def usual(device: str) -> list[Case]:
    """The cases of a run without `--full`: on a GPU all (the clock decides how many), on a CPU fp32 above all."""
    if device == "cuda":
        return everything(device)
    cases = [case_at("kd", shape, "fp32") for shape in SHAPES]
    cases += [case_at("kd", shape, "bf16") for shape in (SMALL, LARGE)]
    cases += [case_at(o, shape, "fp32") for o in ("kd_labels", "cwtm", "dkpp") for shape in (LARGE, SMALL)]
    return list(dict.fromkeys(targets(device) + cases))


def targets(device: str) -> list[Case]:
    """The cases that `targets.py` judges, in the order of their weight."""
    if device == "cuda":
        large: list[tuple[Objective, Shape, Dtype]] = [
            ("kd", HUGE, "bf16"), ("kd", LARGE, "bf16"), ("kd", LARGE, "fp32"), ("kd", SMALL, "fp32"),
            ("cwtm_confidence", HUGE, "bf16"), ("dkpp", LARGE, "fp32"), ("dkpp", SMALL, "fp32"),
            ("dkpp", (128, 10), "fp32"), ("dkpp", (512, 100), "fp32"), ("kd", (128, 10), "fp32"),
            ("kd", (512, 100), "fp32"), ("kd", HUGE, "fp32"), ("kd", (4096, 32000), "bf16"),
        ]  # fmt: skip
        return [case_at(*each) for each in large]
    small = _both("kd", LARGE) + _both("kd", SMALL) + _both("cwtm", LARGE) + _both("dkpp", LARGE)
    return [*small, case_at("cwtm_confidence", LARGE, "fp32")]


def autotuned() -> list[Case]:
    """On a GPU, those where torch.compile's best decides a target: KD at the three sizes."""
    return targets("cuda")[:4]


def left_out(taken: list[Case], device: str) -> list[str]:
    """What `everything` has and `taken` has not, one line an objective, dtype and regime."""
    groups: dict[str, list[str]] = {}
    for case in everything(device):
        if case not in taken:
            group = f"{TITLE[case.objective]} {case.dtype}, {case.regime} logits"
            groups.setdefault(group, []).append(f"[{case.rows}, {case.classes}]")
    return [f"{group}: {', '.join(shapes)}" for group, shapes in groups.items()]


def _both(objective: Objective, shape: Shape) -> list[Case]:
    """At random and at near logits, one after the other: they compile once."""
    regimes: tuple[Regime, ...] = ("random", "near")
    return [case_at(objective, shape, "fp32", regime) for regime in regimes]


def case_at(objective: Objective, shape: Shape, dtype: Dtype, regime: Regime = "random") -> Case:
    """The case at such a shape, (rows, classes)."""
    return Case(objective=objective, rows=shape[0], classes=shape[1], dtype=dtype, regime=regime)
