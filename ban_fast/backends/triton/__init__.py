"""The Triton backend: CUDA tensors, and CPU tensors where TRITON_INTERPRET=1 was set before Triton's import.

The functions of `interface.Backend`, one launch a loss but where `distill_launch` and `cwtm_launch` say otherwise. No host sync, and no
allocation that depends on data, so all of it can be captured in a CUDA graph.
"""

from torch import Tensor

from ban_fast.backends.interface import Divergence, LossOutput, Reduction, WeightBy
from ban_fast.backends.triton.cwtm_launch import weighted_cross_entropy
from ban_fast.backends.triton.distill_launch import Objective, distillation
from ban_fast.backends.triton.gradient_scale import scale
from ban_fast.backends.triton.permute import Permutation
from ban_fast.backends.triton.targets import permutation_of, permuted_targets


def kd(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [M, C]
    labels: Tensor | None,  # [R]
    teacher_rows: Tensor | None,  # [R]
    *,
    temperature: float,
    kd_weight: float,
    label_weight: float,
    divergence: Divergence,
    scale_t2: bool,
    ignore_index: int,
    reduction: Reduction,
    need_grad: bool,
) -> LossOutput:
    """See `interface.Backend.kd`."""
    objective = Objective(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
    return distillation(student, teacher, labels, teacher_rows, objective, None, need_grad)


def dkpp(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [M, C]
    labels: Tensor | None,  # [R]
    sample_ids: Tensor | None,  # [R]
    step: Tensor | int,
    teacher_rows: Tensor | None,  # [R]
    *,
    seed: int,
    temperature: float,
    kd_weight: float,
    label_weight: float,
    divergence: Divergence,
    scale_t2: bool,
    ignore_index: int,
    reduction: Reduction,
    need_grad: bool,
) -> LossOutput:
    """See `interface.Backend.dkpp`."""
    objective = Objective(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
    return distillation(
        student, teacher, labels, teacher_rows, objective, Permutation(sample_ids, step, seed), need_grad
    )


def cwtm(
    student: Tensor,  # [R, C]
    teacher: Tensor | None,  # [M, C]
    labels: Tensor,  # [R]
    confidence: Tensor | None,  # [M]
    normalizer: Tensor | None,  # 0-d
    teacher_rows: Tensor | None,  # [R]
    *,
    weight_by: WeightBy,
    ignore_index: int,
    need_grad: bool,
) -> LossOutput:
    """See `interface.Backend.cwtm`."""
    return weighted_cross_entropy(
        student, teacher, labels, confidence, normalizer, teacher_rows, weight_by, ignore_index, need_grad
    )


def dkpp_targets(
    teacher: Tensor,  # [M, C]
    sample_ids: Tensor | None,  # [R]
    step: Tensor | int,
    teacher_rows: Tensor | None,  # [R]
    *,
    seed: int,
    temperature: float,
) -> Tensor:
    """See `interface.Backend.dkpp_targets`."""
    return permuted_targets(teacher, teacher_rows, Permutation(sample_ids, step, seed), temperature)


def dkpp_permutation(
    argmax: Tensor,  # [R]
    sample_ids: Tensor | None,  # [R]
    step: Tensor | int,
    *,
    seed: int,
    num_classes: int,
) -> Tensor:
    """See `interface.Backend.dkpp_permutation`."""
    return permutation_of(argmax, Permutation(sample_ids, step, seed), num_classes)


def scale_grad_(grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    """See `interface.Backend.scale_grad_`."""
    return scale(grad, grad_output, grad_scale)
