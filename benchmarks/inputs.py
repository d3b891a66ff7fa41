"""The tensors of a case."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ban_fast.backends import reference
from benchmarks.cases import Case, Dtype, Regime

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 0
"""DKPP's seed; its step is 0 too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One set of a step's inputs."""

    student: Tensor  # [B, V], a leaf that requires its gradient
    teacher: Tensor  # [B, V]
    labels: Tensor  # [B] int64
    confidence: Tensor  # [B] fp32, the teacher's largest probability
    step: Tensor | int
    """DKPP's step, 0: a tensor on a GPU, as under CUDA graphs it must be."""


def make_inputs(case: Case, regime: Regime, device: torch.device, *, seed: int) -> Inputs:
    """Logits drawn on the device, fp32 first, then rounded to the case's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.rows, case.classes)
    dtype = TORCH_DTYPE[case.dtype]
    teacher = (2 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    if regime == "near":
        target = teacher.gather(1, our_sources(teacher)) if case.objective == "dkpp" else teacher
        student = (target + 1e-3 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    else:
        student = (2 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    return Inputs(
        student=student.requires_grad_(),
        teacher=teacher,
        labels=torch.randint(case.classes, (case.rows,), generator=generator, device=device),
        confidence=teacher.float().softmax(1).amax(1),
        step=torch.zeros((), dtype=torch.int64, device=device) if device.type == "cuda" else 0,
    )


def our_sources(teacher: Tensor) -> Tensor:
    """[B, V] int64: the class whose value each class takes under our DKPP at seed and step 0."""
    kept = teacher.float().argmax(1)
    return reference.dkpp_permutation(kept, None, 0, seed=SEED, num_classes=teacher.shape[1])
