"""The chunks of `fused_linear_kd`: logits of some rows, their loss and gradient, two products back, then the next rows.

Logits and their gradients are fp32 whatever the layer's dtype (fp64 for fp64): next to its teacher a bf16 student's
q - p is smaller than the rounding of a bf16 logit. GPUs multiply half-precision operands into fp32 sums as they are; a
CPU's half-precision product rounds its result, so there the operands are widened first.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.backends.interface import LossOutput, Reduction, acc_dtype
from ban_fast.ops import products

CHUNK_BYTES = {"cpu": 5 << 20, "cuda": 1 << 30}
"""Of a chunk's logits, both models', and their gradient. Every chunk passes over the weight's gradient once more. CPU:
128 rows of 10,000 classes, whose gradient takes the logits' place. CUDA: a thousand rows of the largest vocabularies,
so that the pass costs less than the product."""
TILE = {"cpu": 8, "cuda": 128}
"""Rows that products are made of: 125 at a time take 3 % longer on a CPU than 128."""
FP16_EXPONENT = 15
"""Gradients are brought below 2^15 before they become fp16, which ends at 65504."""


class Layer(NamedTuple):
    """An output layer as it is multiplied by."""

    weight: Tensor
    """[V, H] in the operands' dtype."""
    bias: Tensor | None
    """[V] acc."""
    rounded_to: torch.dtype
    """What hidden states are rounded to first: the common dtype of both operands, or autocast's."""
    acc: torch.dtype
    """Of logits and gradients."""

    def operand(self, hidden: Tensor) -> Tensor:  # [n, H] -> [n, H]
        """Hidden states in the weight's dtype."""
        return hidden.to(self.rounded_to).to(self.weight.dtype)

    def logits(self, operand: Tensor) -> Tensor:  # [n, H] -> [n, V]
        """operand @ weight^T + bias, in acc."""
        return products.times_transposed(operand, self.weight, self.bias, self.acc)


class Need(NamedTuple):
    """Whose gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Task(NamedTuple):
    """One call over R rows."""

    hidden: Tensor  # [R, H]
    student: Layer
    teacher: Tensor  # [R, V] logits, or [R, H'] hidden states of teacher_layer
    teacher_layer: Layer | None
    labels: Tensor | None  # [R]
    temperature: float
    kd_weight: float
    label_weight: float
    scale_t2: bool
    ignore_index: int

    @property
    def bound(self) -> float:
        """Above every |d loss / d logit| of a row whose loss counts once."""
        return self.kd_weight * (self.temperature if self.scale_t2 else 1 / self.temperature) + self.label_weight


class Sums:
    """Running sums of the gradients of hidden states, weight and bias; the gradient is the sum times `scale` (0-d)."""

    def __init__(self, task: Task, row_weights: Tensor | None, need: Need) -> None:
        (rows, width), classes, acc = task.hidden.shape, task.student.weight.shape[0], task.student.acc
        new = task.hidden.new_empty if rows else task.hidden.new_zeros
        self.hidden = new((rows, width), dtype=acc) if need.hidden else None
        self.weight = new((classes, width), dtype=acc) if need.weight else None
        self.bias = task.hidden.new_zeros(classes, dtype=acc) if need.bias else None
        self.scale = task.hidden.new_ones((), dtype=acc)
        self._matrix = task.student.weight
        self._up = 1.0
        self._row_weights = row_weights
        if self._matrix.dtype == torch.float16:
            exponent = FP16_EXPONENT - math.frexp(task.bound)[1]
            self._up = 2.0 ** max(-100, min(100, exponent))
            if row_weights is not None:
                peak = row_weights.abs().amax().clamp_min(torch.finfo(acc).tiny)
                self._row_weights, self.scale = row_weights / peak, peak
            self.scale = self.scale / self._up

    def add(self, rows: slice, operand: Tensor, gradient: Tensor) -> None:  # [n, H], [n, V]
        """A chunk's hidden states and d loss / d logits, which is overwritten."""
        if self._row_weights is not None:
            gradient.mul_(self._row_weights[rows].unsqueeze(1))
        if self._up != 1.0:
            gradient.mul_(self._up)
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(operand.dtype)
        if self.hidden is not None:
            products.times(self.hidden[rows], gradient, self._matrix)
        if self.weight is not None:
            products.transposed_times(self.weight, gradient, operand, add=rows.start > 0)


def layer(weight: Tensor, bias: Tensor | None, hidden: Tensor, autocast: torch.dtype | None) -> Layer:
    """The layer for such hidden states; `autocast` is the dtype that F.linear would cast both to."""
    rounded_to = autocast or torch.promote_types(hidden.dtype, weight.dtype)
    acc = acc_dtype(rounded_to)
    operands = rounded_to if multiplies_halves(weight.device) else acc
    wide_bias = None if bias is None else bias.to(rounded_to).to(acc).contiguous()
    return Layer(products.dense(weight.to(rounded_to).to(operands)), wide_bias, rounded_to, acc)


def multiplies_halves(device: torch.device) -> bool:
    """Whether torch multiplies half-precision matrices there into fp32 ones."""
    return device.type == "cuda"


def run(
    task: Task, reduction: Reduction, row_weights: Tensor | None, need: Need, chunk_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor, Sums]:
    """Loss, KD term, label term, and the gradients needed: none for reduction "none".

    `row_weights` [R] multiply the gradients of rows, not their losses.
    """
    sums = Sums(task, row_weights, need)
    each_row = reduction == "none"
    shape = task.hidden.shape[:1] if each_row else ()
    values = [task.hidden.new_zeros(shape, dtype=task.student.acc) for _ in range(3)]
    kept = None if task.labels is None else (task.labels != task.ignore_index).unsqueeze(1)
    for rows in chunks(task, any(need), chunk_bytes):
        operand = task.student.operand(task.hidden[rows])
        if kept is not None:  # what is ignored may be NaN, and 0 * NaN would reach the weight
            operand = torch.where(kept[rows], operand, 0)
        output = _loss_of_chunk(task, rows, operand, "none" if each_row else "sum", any(need))
        for value, part in zip(values, output[:3], strict=True):
            if each_row:
                value[rows] = part
            else:
                value += part
        if output.grad is not None:
            sums.add(rows, operand, output.grad)
        del output  # before the next chunk's logits come
    if reduction == "mean":
        share = _share(kept, task)
        for value in (*values, sums.scale):
            value *= share
    loss, kd, label = values
    return loss, kd, label, sums


def _loss_of_chunk(
    task: Task, rows: slice, operand: Tensor, reduction: Reduction, need_grad: bool
) -> LossOutput:  # operand [n, H]
    student = task.student.logits(operand)
    teacher = task.teacher[rows]
    if task.teacher_layer is not None:
        teacher = task.teacher_layer.logits(task.teacher_layer.operand(teacher))
    backend = dispatch.resolve("auto", "kd", student)
    kd = getattr(backend, "kd_in_place", backend.kd) if need_grad else backend.kd
    output: LossOutput = kd(
        student,
        teacher,
        None if task.labels is None else task.labels[rows],
        None,
        temperature=task.temperature,
        kd_weight=task.kd_weight,
        label_weight=task.label_weight,
        divergence="kl",
        scale_t2=task.scale_t2,
        ignore_index=task.ignore_index,
        reduction=reduction,
        need_grad=need_grad,
    )
    return output


def chunks(task: Task, need_grad: bool, chunk_bytes: int | None) -> Iterator[slice]:
    """Slices of the rows, each within the budget unless it is a single row."""
    rows, device = len(task.hidden), task.hidden.device.type
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) if chunk_bytes is None else chunk_bytes
    size = chunk_size(rows, bytes_per_row(task, need_grad), budget, device)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def bytes_per_row(task: Task, need_grad: bool) -> int:
    """What a row of a chunk holds: its logits, their gradient, that in the operands' dtype, the teacher's logits.

    On a CPU the gradient takes the place of the logits.
    """
    student, teacher = task.student, task.teacher_layer
    each = student.acc.itemsize
    if need_grad:
        each += 0 if task.hidden.device.type == "cpu" else student.acc.itemsize
        each += student.weight.dtype.itemsize if student.weight.dtype != student.acc else 0
    each += 0 if teacher is None else teacher.acc.itemsize
    return each * student.weight.shape[0]


def chunk_size(rows: int, each: int, budget: int, device_type: str) -> int:
    """Rows a chunk holds: at most `budget // each` (bytes), chunks as equal as possible, in whole tiles where one fits;
    at least 1."""
    most = max(1, budget // each)
    even = math.ceil(rows / max(1, math.ceil(rows / most)))
    tile = TILE.get(device_type, TILE["cpu"])
    tiled = math.ceil(even / tile) * tile
    return tiled if 0 < tiled <= most else (most - most % tile) or max(1, even)


def _share(kept: Tensor | None, task: Task) -> Tensor:
    """0-d: 1 / the rows kept, at least one."""
    if kept is None:
        return task.hidden.new_full((), 1 / max(1, len(task.hidden)), dtype=task.student.acc)
    return kept.sum().clamp_min(1).to(task.student.acc).reciprocal()
