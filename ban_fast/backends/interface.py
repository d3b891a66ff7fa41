"""What a backend is: a module with the functions of `Backend`, over validated, flattened tensors.

The ops (`ban_fast/ops`) check arguments, flatten leading dimensions and own autograd; a backend computes.
Shapes: R rows, C classes, M rows of the teacher (R unless `teacher_rows` selects among them). Logits are fp32, fp16,
bf16 or fp64 with any strides, and the two may differ. "acc" is the arithmetic: fp64 where the student is fp64,
otherwise fp32. A row whose label is ignore_index is not read. Labels and teacher rows that are out of range in
another row: on the CPU a ValueError, on a GPU a NaN loss and a zero gradient in that row, never a read out of bounds.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Divergence = Literal["kl", "ce"]
Reduction = Literal["mean", "sum", "none"]
WeightBy = Literal["teacher_max", "teacher_label"]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of logits and of features of `dtype`, in which what is computed of them is summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LossOutput(NamedTuple):
    """Loss, its two terms and the gradient, from one pass. No two share memory: torch.library demands it."""

    loss: Tensor
    """acc; 0-d, or [R] for reduction "none" (0 in ignored rows)."""
    kd: Tensor
    """The KD term, reduced like the loss, T^2 included, before kd_weight; zeros for CWTM."""
    label: Tensor
    """The label term, reduced like the loss, before label_weight, be that 0; zeros where there are no labels."""
    grad: Tensor | None
    """[R, C] in the student's dtype, contiguous: d loss / d student at grad_output 1, times 1 / grad_scale.
    None where need_grad is False."""
    grad_scale: Tensor | None
    """0-d acc power of two that `grad` must still be multiplied by, or None for 1. Only fp16 students have one: the
    gradient is stored at the largest power of two that cannot overflow, so that an AMP loss scale that comes
    later still finds its bits."""

    def of_no_rows(self) -> "LossOutput":
        """Itself, filled for an empty batch, which no kernel is launched for."""
        for term in (self.loss, self.kd, self.label):
            term.zero_()
        if self.grad_scale is not None:
            self.grad_scale.fill_(1)
        return self


Usual = tuple[Tensor, Tensor | None, Tensor | None]
"""Loss, grad and grad_scale as LossOutput has them."""


class Backend(Protocol):
    """The functions every backend offers. No argument is changed, and none syncs the host with a GPU.

    Without `need_terms` an output's `kd` and `label` may be of shape [0]: allocating them is a tenth of a small loss.
    A backend may also have `usual_kd`: by position student, teacher, labels and teacher_rows, none of them checked, the
    options of `kd` in their order but for need_terms, and the number of threads. It gives a `Usual`, or None if the
    call is not of the usual kind; the caller then checks its arguments and calls `kd`. It may have `kd_in_place`: `kd`
    for fp32 or fp64 students, whose gradient, where it is needed, takes the place of their logits if those are
    contiguous.
    """

    def kd(
        self,
        student: Tensor,  # [R, C]
        teacher: Tensor,  # [M, C]
        labels: Tensor | None,  # [R] int64
        teacher_rows: Tensor | None,  # [R] int64 into M
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
        """kd_weight * T^2 * KL(p_T || q_T) + label_weight * CE(q, labels)."""
        ...

    def cwtm(
        self,
        student: Tensor,  # [R, C]
        teacher: Tensor | None,  # [M, C]; None exactly where confidence is given
        labels: Tensor,  # [R] int64
        confidence: Tensor | None,  # [M] fp32: c of every teacher row
        normalizer: Tensor | None,  # 0-d acc: stands for sum_u c_u
        teacher_rows: Tensor | None,  # [R] int64 into M
        *,
        weight_by: WeightBy,
        ignore_index: int,
        need_grad: bool,
        need_terms: bool = True,
    ) -> LossOutput:
        """sum_s w_s CE_s with w_s = c_s / sum_u c_u over the rows kept; `label` repeats the loss, detached."""
        ...

    def dkpp(
        self,
        student: Tensor,  # [R, C]
        teacher: Tensor,  # [M, C]
        labels: Tensor | None,  # [R] int64
        sample_ids: Tensor | None,  # [R] int64; None: 0..R-1
        step: Tensor | int,  # 0-d int64 or int
        teacher_rows: Tensor | None,  # [R] int64 into M
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
        """`kd` against the teacher's row with every output but its argmax permuted."""
        ...

    def dkpp_targets(
        self,
        teacher: Tensor,  # [M, C]
        sample_ids: Tensor | None,  # [R] int64; None: 0..R-1
        step: Tensor | int,
        teacher_rows: Tensor | None,  # [R] int64 into M; None: R = M
        *,
        seed: int,
        temperature: float,
    ) -> Tensor:
        """The permuted distributions [R, C], fp32 (fp64 for an fp64 teacher)."""
        ...

    def dkpp_permutation(
        self,
        argmax: Tensor,  # [R] int64: the class each row keeps
        sample_ids: Tensor | None,  # [R] int64; None: 0..R-1
        step: Tensor | int,
        *,
        seed: int,
        num_classes: int,
    ) -> Tensor:
        """[R, C] int64: class j of the target takes the teacher's value of class result[:, j]."""
        ...

    def scale_grad_(self, grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
        """grad *= grad_output * grad_scale in place, in acc with one rounding, and return it: the same bits where the
        product is 1; kernels then touch nothing. grad_output is 0-d, or [R] for reduction "none"."""
        ...
