"""Arguments of the losses, checked before anything is computed: ValueError that names the argument and what it was."""

import sys

import torch
from torch import Tensor

from ban_fast.errors import suggest

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
DIVERGENCES = ("kl", "ce")
REDUCTIONS = ("mean", "sum", "none")
WEIGHTS_BY = ("teacher_max", "teacher_label")
COLDEST, HOTTEST = 1e-18, 1e18
"""Temperatures whose square and its inverse fp32 holds as normal numbers."""
MOST_CLASSES = 1 << 30
"""Kernels for GPUs count classes, and the lanes of a block beyond the last, in 32 bits."""
_INT64_END = 1 << 63


def check_temperature(value: float) -> None:
    """A number from COLDEST to HOTTEST."""
    if not isinstance(value, (int, float)) or not COLDEST <= value <= HOTTEST:
        raise ValueError(f"temperature: {value!r} is not an int or float from {COLDEST} to {HOTTEST}")


def check_weight(name: str, value: float) -> None:
    """Finite and not negative."""
    if not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name}: {value!r} is not a finite int or float from 0 up")


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """One of `valid`."""
    if value not in valid:
        raise ValueError(f"{name}: {value!r} is unknown{suggest(str(value), valid)}")


def check_int(name: str, value: int) -> None:
    """An integer of 64 bits."""
    if not isinstance(value, int) or not -_INT64_END <= value < _INT64_END:
        raise ValueError(f"{name}: {value!r} is not an int of 64 bits")


def check_flag(name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not True or False")


def check_kd_options(
    temperature: float,
    kd_weight: float,
    label_weight: float,
    divergence: str,
    scale_t2: bool,
    ignore_index: int,
    reduction: str,
) -> None:
    """What KDLoss and DKPPLoss have in common."""
    check_temperature(temperature)
    check_weight("kd_weight", kd_weight)
    check_weight("label_weight", label_weight)
    check_choice("divergence", divergence, DIVERGENCES)
    check_flag("scale_t2", scale_t2)
    check_int("ignore_index", ignore_index)
    check_choice("reduction", reduction, REDUCTIONS)


def check_logits(name: str, logits: Tensor) -> None:
    """[..., C] in one of the four dtypes, C from 1 to MOST_CLASSES."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name}: a {type(logits).__name__} was given, not a tensor")
    check_layout(name, logits)
    if logits.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {logits.dtype} is not float32, float16, bfloat16 or float64")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: shape {list(logits.shape)} has no classes; [..., C] is needed")
    if logits.shape[-1] > MOST_CLASSES:
        raise ValueError(f"{name}: shape {list(logits.shape)} has more than {MOST_CLASSES} classes")


def check_teacher(student: Tensor, teacher: Tensor, teacher_rows: Tensor | None) -> None:
    """The student's shape, or [M, C] where `teacher_rows` selects from it."""
    check_logits("teacher_logits", teacher)
    _check_device("teacher_logits", teacher, student)
    if teacher_rows is None:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher_logits: shape {list(teacher.shape)} is not student_logits' {list(student.shape)}"
                + _rows_hint(student, teacher)
            )
    elif teacher.dim() != 2 or teacher.shape[1] != student.shape[-1]:
        raise ValueError(
            f"teacher_logits: shape {list(teacher.shape)} is not [M, {student.shape[-1]}], as teacher_rows needs it"
        )
    elif teacher.shape[0] == 0 and student.numel():
        raise ValueError(f"teacher_logits: shape {list(teacher.shape)} has no rows for teacher_rows to select")
    else:
        check_teacher_rows(teacher_rows, student)


def _rows_hint(student: Tensor, teacher: Tensor) -> str:
    same_classes = teacher.dim() == 2 and teacher.shape[1] == student.shape[-1]
    return "; give teacher_rows to select from a cache" if same_classes else ""


def check_rows(name: str, indices: Tensor, logits: Tensor) -> None:
    """int64 of the labels' shape, which is the logits' without classes."""
    _check_int64(name, indices)
    if indices.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: shape {list(indices.shape)} is not {list(logits.shape[:-1])}, "
            f"one for each row of logits {list(logits.shape)}"
        )
    _check_device(name, indices, logits)


def check_labels(labels: Tensor | None, student: Tensor, label_weight: float) -> None:
    """One int64 a row; not to be left out where they have a weight."""
    if labels is not None:
        check_rows("labels", labels, student)
    elif label_weight > 0:
        raise ValueError(f"labels: None was given, and label_weight is {label_weight}")


def check_teacher_rows(teacher_rows: Tensor | None, student: Tensor) -> None:
    """One int64 a row, or None."""
    if teacher_rows is not None:
        check_rows("teacher_rows", teacher_rows, student)


def check_operands(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, ids: Tensor | None, teacher_rows: Tensor | None
) -> None:
    """What an operator is called with, its logits as rows [R, C]: a recorded graph meets tensors that nobody checked.

    Kernels read as many rows and classes as the student has, from addresses.
    """
    check_logits("student_logits", student)
    if student.dim() != 2:
        raise ValueError(f"student_logits: shape {list(student.shape)} is not [R, C]")
    if teacher is not None:
        check_teacher(student, teacher, teacher_rows)
    for name, indices in (("labels", labels), ("sample_ids", ids), ("teacher_rows", teacher_rows)):
        if indices is not None:
            check_rows(name, indices, student)


def check_targets(teacher: Tensor, sample_ids: Tensor | None, teacher_rows: Tensor | None) -> tuple[int, ...]:
    """Arguments of dkpp_targets; returns the shape of the result."""
    shape = tuple(teacher.shape)
    if teacher_rows is not None:
        _check_int64("teacher_rows", teacher_rows)
        if teacher.dim() != 2:
            raise ValueError(f"teacher_logits: shape {list(shape)} is not [M, C], as teacher_rows needs it")
        if shape[0] == 0 and teacher_rows.numel():
            raise ValueError(f"teacher_logits: shape {list(shape)} has no rows for teacher_rows to select")
        _check_device("teacher_rows", teacher_rows, teacher)
        shape = (*teacher_rows.shape, shape[1])
    if sample_ids is None:
        return shape
    _check_int64("sample_ids", sample_ids)
    if tuple(sample_ids.shape) != shape[:-1]:
        raise ValueError(f"sample_ids: shape {list(sample_ids.shape)} is not {list(shape[:-1])}, one for each row")
    _check_device("sample_ids", sample_ids, teacher)
    return shape


def check_step(step: Tensor | int, logits: Tensor) -> None:
    """An int, or a 0-d int64 tensor on the logits' device."""
    if not isinstance(step, Tensor):
        check_int("step", step)
        return
    if step.dtype != torch.int64 or step.dim() != 0:
        raise ValueError(
            f"step: a {step.dtype} tensor of shape {list(step.shape)} was given; an int or 0-d int64 is needed"
        )
    _check_device("step", step, logits)


def check_confidence(confidence: Tensor, student: Tensor, teacher_rows: Tensor | None) -> None:
    """fp32: [M] where `teacher_rows` selects from it, else one for each of the student's rows."""
    if not isinstance(confidence, Tensor) or confidence.dtype != torch.float32:
        raise ValueError(f"confidence: {_kind(confidence)} was given; a float32 tensor is needed")
    check_layout("confidence", confidence)
    _check_device("confidence", confidence, student)
    if teacher_rows is None:
        if confidence.shape != student.shape[:-1]:
            raise ValueError(f"confidence: shape {list(confidence.shape)} is not {list(student.shape[:-1])}")
    elif confidence.dim() != 1:
        raise ValueError(f"confidence: shape {list(confidence.shape)} is not [M], as teacher_rows needs it")
    elif confidence.shape[0] == 0 and student.numel():
        raise ValueError("confidence: shape [0] has no rows for teacher_rows to select")


def check_normalizer(normalizer: Tensor, student: Tensor) -> None:
    """0-d, fp32 or fp64."""
    if not isinstance(normalizer, Tensor):
        raise ValueError(f"normalizer: {normalizer!r} is not a tensor; a 0-d one is needed")
    if normalizer.dim() != 0 or normalizer.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"normalizer: a {normalizer.dtype} tensor of shape {list(normalizer.shape)} was given; "
            "a 0-d float32 or float64 one is needed"
        )
    _check_device("normalizer", normalizer, student)


def _check_int64(name: str, indices: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise ValueError(f"{name}: {_kind(indices)} was given; an int64 tensor is needed")
    check_layout(name, indices)


def check_layout(name: str, tensor: Tensor) -> None:
    """Sparse, MKL-DNN's and nested tensors have no strides."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name}: a tensor of layout {layout} was given; a dense one, torch.strided, is needed")


def _check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name}: on {tensor.device}, and the logits are on {logits.device}")


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
