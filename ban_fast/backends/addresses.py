"""Tensors as the native kernels take them: addresses, numbers for dtypes and reductions, sizes and strides."""

import torch
from torch import Tensor

from ban_fast.backends.interface import LossOutput

DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
REDUCTION = {"mean": 0, "sum": 1, "none": 2}
NO_MATRIX = (0, 0, 0, 0, 0)
"""As `matrix`, of a matrix that is not there."""


def result(output: LossOutput) -> tuple[int, int, int, int, int]:
    """Addresses of a loss's outputs; null where there is none."""
    loss, kd, label, grad, grad_scale = output
    return (
        loss.data_ptr(),
        kd.data_ptr(),
        label.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if grad_scale is None else grad_scale.data_ptr(),
    )


def matrix(logits: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype, rows and strides of logits [R, C]."""
    row_stride, column_stride = logits.stride()
    return logits.data_ptr(), DTYPE[logits.dtype], logits.shape[0], row_stride, column_stride


def selection(
    student: Tensor, labels: Tensor | None, teacher_rows: Tensor | None, ignore_index: int
) -> tuple[int, int, int, int, int]:
    """Rows, classes, the addresses of labels and teacher rows (null: none), ignore_index."""
    rows, classes = student.shape
    return (
        rows,
        classes,
        0 if labels is None else labels.data_ptr(),  # written out: a call would cost a small loss another 0.1 us
        0 if teacher_rows is None else teacher_rows.data_ptr(),
        ignore_index,
    )


def key(seed: int, step: Tensor | int, sample_ids: Tensor | None) -> tuple[int, int, int]:
    """Seed and step as 64-bit words in two's complement."""
    return seed & 0xFFFFFFFFFFFFFFFF, int(step) & 0xFFFFFFFFFFFFFFFF, address(sample_ids)


def address(tensor: Tensor | None) -> int:
    """Of its memory; null for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Itself, or a copy that is."""
    return tensor if tensor is None else tensor.contiguous()
