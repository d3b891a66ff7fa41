"""The Triton backend: CUDA tensors, and CPU tensors where TRITON_INTERPRET=1 was set before Triton's import.

The functions of `interface.Backend`, one launch a loss but where `distill_launch` and `cwtm_launch` say otherwise. No host sync, and no
allocation that depends on data, so all of it can be captured in a CUDA graph. `problem` says where it cannot be used.
"""

import torch
from torch import Tensor

try:
    from triton.runtime.jit import JITFunction
except ImportError as error:
    raise ImportError(f"Triton is not installed, or broken ({error}); `pip install triton`") from error

from ban_fast.backends.interface import Divergence, LossOutput, Reduction, WeightBy
from ban_fast.backends.triton.cwtm_launch import weighted_cross_entropy
from ban_fast.backends.triton.distill_launch import Objective, distillation
from ban_fast.backends.triton.gradient_scale import scale, scale_kernel
from ban_fast.backends.triton.permute import Permutation
from ban_fast.backends.triton.targets import permutation_of, permuted_targets

MIN_CAPABILITY = (8, 0)
"""Compute capability below which a GPU has no bfloat16, and Triton no asynchronous copies."""


def problem(device_type: str) -> str | None:
    """None where tensors on devices of this type can be served, else the reason why not."""
    interpreted = not isinstance(scale_kernel, JITFunction)
    if device_type == "cpu":
        return (
            None if interpreted else "on the CPU Triton only interprets, where TRITON_INTERPRET=1 is set at its import"
        )
    if device_type != "cuda":
        return f"its kernels are for CUDA devices, not {device_type!r}"
    if interpreted:
        return "TRITON_INTERPRET=1 was set at Triton's import: it interprets on the CPU"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs, and this PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
            return f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


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
    need_terms: bool = True,
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
    need_terms: bool = True,
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
    need_terms: bool = True,
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
