"""The reference backend: eager torch on any device, in the open. Truth for the other backends, and the fallback.

The functions of `interface.Backend`. Nothing here waits for a GPU: row counts, masks and scales stay tensors, and
an index that is out of range makes its row NaN (on the CPU, where looking costs nothing, it is a ValueError).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ban_fast.backends.interface import Divergence, LossOutput, Reduction, WeightBy, acc_dtype
from ban_fast.backends.permutation import permutation
from ban_fast.backends.reference_rows import kd_rows, label_rows, log_probability, max_probability, probabilities


@torch.no_grad()
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
    rows = _rows(student.shape, teacher.shape[0], labels, teacher_rows, ignore_index, student.device)
    target = teacher if rows.teacher is None else teacher[rows.teacher]
    objective = _Objective(temperature, kd_weight, label_weight, divergence, scale_t2, reduction)
    return _distill(student, target, rows, objective, need_grad)


@torch.no_grad()
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
    rows = _rows(student.shape, teacher.shape[0], labels, teacher_rows, ignore_index, student.device)
    target = teacher if rows.teacher is None else teacher[rows.teacher]
    objective = _Objective(temperature, kd_weight, label_weight, divergence, scale_t2, reduction)
    return _distill(student, _permuted(target, sample_ids, step, seed), rows, objective, need_grad)


@torch.no_grad()
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
    source = confidence if confidence is not None else teacher
    assert source is not None
    rows = _rows(student.shape, source.shape[0], labels, teacher_rows, ignore_index, student.device)
    assert rows.labels is not None
    source = (source if rows.teacher is None else source[rows.teacher]).to(acc_dtype(student.dtype))
    if confidence is None and weight_by == "teacher_label":
        log_c = log_probability(source, rows.labels)
        log_sum = log_c.where(rows.sound, -torch.inf).logsumexp(0) if normalizer is None else normalizer.log()
        weight = (log_c - log_sum).exp()
    else:
        c = max_probability(source) if confidence is None else source
        weight = c / (c.where(rows.sound, 0).sum() if normalizer is None else normalizer)

    term = label_rows(student.to(acc_dtype(student.dtype)), rows.labels)
    loss = _reduced(torch.where(weight == 0, 0, weight * term.ce), rows, "sum")
    output = LossOutput(loss, torch.zeros_like(loss), loss.clone(), None, None)
    if not need_grad:
        return output
    bound = weight.where(rows.sound, 0).amax() if weight.numel() else torch.zeros_like(loss)
    return _with_gradient(output, weight.unsqueeze(1) * term.difference, bound, rows, student.dtype)


@torch.no_grad()
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
    shape = teacher.shape if teacher_rows is None else torch.Size((teacher_rows.shape[0], teacher.shape[1]))
    rows = _rows(shape, teacher.shape[0], None, teacher_rows, 0, teacher.device)
    target = teacher if rows.teacher is None else teacher[rows.teacher]
    target = _permuted(target.to(acc_dtype(teacher.dtype)), sample_ids, step, seed)
    return torch.where(rows.sound.unsqueeze(1), probabilities(target, temperature), torch.nan)


@torch.no_grad()
def dkpp_permutation(
    argmax: Tensor,  # [R]
    sample_ids: Tensor | None,  # [R]
    step: Tensor | int,
    *,
    seed: int,
    num_classes: int,
) -> Tensor:
    """See `interface.Backend.dkpp_permutation`."""
    return permutation(argmax, sample_ids, step, seed=seed, num_classes=num_classes)


@torch.no_grad()
def scale_grad_(grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    """See `interface.Backend.scale_grad_`. Times 1 it rewrites the same bits: to know that it is 1 would be to wait."""
    factor = grad_output if grad_scale is None else grad_output * grad_scale
    if factor.dim() == 1:
        factor = factor.unsqueeze(1)
    return grad.copy_(grad.to(factor.dtype) * factor)


class _Objective(NamedTuple):
    temperature: float
    kd_weight: float
    label_weight: float
    divergence: Divergence
    scale_t2: bool
    reduction: Reduction


class _Rows(NamedTuple):
    """Which rows count, and indices that are safe to read with."""

    kept: Tensor
    """[R] not ignored."""
    sound: Tensor
    """[R] kept, and with no index out of range."""
    labels: Tensor | None
    """[R] 0 where the row is not sound."""
    teacher: Tensor | None
    """[R] 0 where the row is not sound."""


def _rows(
    shape: torch.Size,  # (R, C)
    teacher_size: int,
    labels: Tensor | None,
    teacher_rows: Tensor | None,
    ignore_index: int,
    device: torch.device,
) -> _Rows:
    num_rows, num_classes = shape
    kept = torch.ones(num_rows, dtype=torch.bool, device=device) if labels is None else labels != ignore_index
    sound = kept
    if labels is not None:
        limit = f"{num_classes} classes (ignore_index is {ignore_index})"
        sound = sound & _in_range(labels, num_classes, kept, "labels", limit)
    if teacher_rows is not None:
        limit = f"{teacher_size} teacher rows"
        sound = sound & _in_range(teacher_rows, teacher_size, kept, "teacher_rows", limit)
    return _Rows(
        kept,
        sound,
        None if labels is None else labels.where(sound, 0),
        None if teacher_rows is None else teacher_rows.where(sound, 0),
    )


def _in_range(index: Tensor, size: int, kept: Tensor, name: str, limit: str) -> Tensor:
    """[R] whether each index may be used."""
    fits = (index >= 0) & (index < size)
    if index.device.type == "cpu":
        _refuse(index, kept & ~fits, name, limit)
    return fits


def _refuse(index: Tensor, wrong: Tensor, name: str, limit: str) -> None:
    """ValueError for the first row that is kept and out of range."""
    rows = wrong.nonzero()
    if rows.numel():
        row = int(rows[0])
        raise ValueError(f"{name}: {int(index[row])} in row {row} is out of range for {limit}")


def _distill(student: Tensor, target: Tensor, rows: _Rows, objective: _Objective, need_grad: bool) -> LossOutput:
    """KD against a teacher's row for each of the student's, and the label term."""
    o = objective
    z = student.to(acc_dtype(student.dtype))
    term = kd_rows(z, target.to(z.dtype), o.temperature)
    kd_value = term.kl if o.divergence == "kl" else term.kl + term.entropy
    kd_value = _reduced(kd_value * (o.temperature**2 if o.scale_t2 else 1.0), rows, o.reduction)
    label = None if rows.labels is None else label_rows(z, rows.labels)
    label_value = torch.zeros_like(kd_value) if label is None else _reduced(label.ce, rows, o.reduction)

    loss = torch.zeros_like(kd_value)
    gradient = torch.zeros_like(z)
    kd_factor = o.kd_weight * (o.temperature if o.scale_t2 else 1 / o.temperature)
    if o.kd_weight != 0:  # a term without weight may be infinite
        loss = loss + o.kd_weight * kd_value
        gradient = gradient + kd_factor * term.difference
    if o.label_weight != 0 and label is not None:
        loss = loss + o.label_weight * label_value
        gradient = gradient + o.label_weight * label.difference
    output = LossOutput(loss, kd_value, label_value, None, None)
    if not need_grad:
        return output
    each = 1 / _count(rows, z.dtype) if o.reduction == "mean" else z.new_ones(())
    return _with_gradient(output, gradient * each, (kd_factor + o.label_weight) * each, rows, student.dtype)


def _reduced(value: Tensor, rows: _Rows, reduction: Reduction) -> Tensor:
    """The rows' values [R] as the loss has them: 0 where ignored, NaN where an index is out of range."""
    value = torch.where(rows.sound, value, torch.where(rows.kept, torch.nan, 0.0).to(value.dtype))
    if reduction == "none":
        return value
    return value.sum() / _count(rows, value.dtype) if reduction == "mean" else value.sum()


def _count(rows: _Rows, dtype: torch.dtype) -> Tensor:
    """0-d: rows kept, at least 1."""
    return rows.kept.sum().clamp_min(1).to(dtype)


def _with_gradient(output: LossOutput, gradient: Tensor, bound: Tensor, rows: _Rows, dtype: torch.dtype) -> LossOutput:
    """Store the gradient [R, C] in the student's dtype; `bound` (0-d) is above every |gradient|."""
    gradient = torch.where(rows.sound.unsqueeze(1), gradient, 0).contiguous()
    if dtype != torch.float16:
        return output._replace(grad=gradient.to(dtype))
    # Built from their bits, powers of two are exact on every device: with bound < 2^(e - 126), e its biased exponent,
    # bound * 2^(141 - e) stays below 2^15, and fp16 ends at 65504.
    exponent = ((bound.view(torch.int32) >> 23) & 0xFF).clamp(15, 253)
    up, down = ((268 - exponent) << 23).view(torch.float32), ((exponent - 14) << 23).view(torch.float32)
    return output._replace(grad=(gradient * up).to(dtype), grad_scale=down)


def _permuted(target: Tensor, sample_ids: Tensor | None, step: Tensor | int, seed: int) -> Tensor:
    """The rows [R, C] with every class but their argmax's (lowest index, on fp32 logits) permuted."""
    kept = target.to(torch.float32).argmax(dim=1)
    return target.gather(1, permutation(kept, sample_ids, step, seed=seed, num_classes=target.shape[1]))
