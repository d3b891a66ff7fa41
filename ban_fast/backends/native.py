"""The native backend: C++ kernels on CPU tensors (csrc/). This module allocates outputs and hands addresses over.

The functions of `interface.Backend`. Importing it is an ImportError where `ban_fast._native` was not built.

Large results are made of memory that is kept for the next: never more than was in use at once, nor more than 1 GiB, or
than BAN_FAST_POOL_MIB from the environment. `empty_pool` gives back what is not in use.
"""

import torch
from torch import Tensor

from ban_fast.backends.addresses import DTYPE, NO_MATRIX, REDUCTION, address, contiguous, key, matrix, result, selection
from ban_fast.backends.interface import Divergence, LossOutput, Reduction, WeightBy, acc_dtype
from ban_fast.errors import UserError

try:
    from ban_fast import _native
except ImportError as error:
    raise ImportError(
        f"ban_fast._native cannot be imported ({error}): install ban_fast where there is a C++ compiler, "
        "with `pip install -e .` in its source tree"
    ) from error

_INTERFACE = 1
"""Goes up with every change of what is handed over: the kernels trust it, and a module built before would crash."""
if getattr(_native, "INTERFACE", None) != _INTERFACE:
    raise ImportError("ban_fast._native was built from other sources than these: run `pip install -e .` again")

_SCALAR_32, _SCALAR_64 = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64))
_NO_TERM = torch.empty(0, device="cpu")  # its address is null
_POOLED_FROM = 1 << 20
"""Bytes. Of less, fresh memory costs under a tenth of the kernel's time, and malloc keeps most of it."""

usual_kd = _native.usual_kd


def check_environment() -> None:
    """UserError where BAN_FAST_ISA or BAN_FAST_POOL_MIB is nothing that the kernels take."""
    try:
        _native.instruction_set()
        _native.PooledMemory(0)
    except ValueError as error:
        raise UserError(str(error)) from error


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
    output = _allocate(student, reduction, need_grad, need_terms)
    options = temperature, kd_weight, label_weight, divergence == "ce", scale_t2, REDUCTION[reduction]
    return _kd(student, teacher, labels, teacher_rows, options, ignore_index, output)


def kd_in_place(
    student: Tensor,  # [R, C] fp32 or fp64
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
    """See `interface.Backend`. The kernel has read all of a row before it writes the row's gradient."""
    in_place = need_grad and student.is_contiguous()
    output = _allocate(student, reduction, need_grad and not in_place, True)
    if in_place:
        output = output._replace(grad=student)
    options = temperature, kd_weight, label_weight, divergence == "ce", scale_t2, REDUCTION[reduction]
    return _kd(student, teacher, labels, teacher_rows, options, ignore_index, output)


def _kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    teacher_rows: Tensor | None,
    options: tuple[float, float, float, bool, bool, int],
    ignore_index: int,
    output: LossOutput,
) -> LossOutput:
    """`output`, filled."""
    labels, teacher_rows = contiguous(labels), contiguous(teacher_rows)
    offence = _native.kd(
        matrix(student),
        matrix(teacher),
        selection(student, labels, teacher_rows, ignore_index),
        options,
        result(output),
        torch.get_num_threads(),
    )
    if offence[0]:
        _refuse(offence, labels, teacher_rows, student.shape[1], teacher.shape[0], ignore_index)
    return output


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
    labels, teacher_rows, sample_ids = contiguous(labels), contiguous(teacher_rows), contiguous(sample_ids)
    output = _allocate(student, reduction, need_grad, need_terms)
    offence = _native.dkpp(
        matrix(student),
        matrix(teacher),
        selection(student, labels, teacher_rows, ignore_index),
        key(seed, step, sample_ids),
        (temperature, kd_weight, label_weight, divergence == "ce", scale_t2, REDUCTION[reduction]),
        result(output),
        torch.get_num_threads(),
    )
    if offence[0]:
        _refuse(offence, labels, teacher_rows, student.shape[1], teacher.shape[0], ignore_index)
    return output


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
    labels, teacher_rows = labels.contiguous(), contiguous(teacher_rows)
    source = teacher if confidence is None else confidence.unsqueeze(1)
    assert source is not None, "cwtm needs the teacher's logits or its confidence"
    output = _allocate(student, "sum", need_grad, need_terms)
    offence = _native.cwtm(
        matrix(student),
        matrix(source) if confidence is None else NO_MATRIX,
        NO_MATRIX if confidence is None else matrix(source),
        selection(student, labels, teacher_rows, ignore_index),
        normalizer is not None,
        0.0 if normalizer is None else float(normalizer),
        weight_by == "teacher_label",
        result(output),
        torch.get_num_threads(),
    )
    if offence[0]:
        _refuse(offence, labels, teacher_rows, student.shape[1], source.shape[0], ignore_index)
    return output


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
    teacher_rows, sample_ids = contiguous(teacher_rows), contiguous(sample_ids)
    rows = teacher.shape[0] if teacher_rows is None else teacher_rows.shape[0]
    classes = teacher.shape[1]
    shape, dtype = torch.Size((rows, classes)), acc_dtype(teacher.dtype)
    is_large = shape.numel() * dtype.itemsize >= _POOLED_FROM
    targets = _pooled(shape, dtype) if is_large else teacher.new_empty(shape, dtype=dtype)
    offence = _native.dkpp_targets(
        matrix(teacher),
        (rows, classes, 0, address(teacher_rows), 0),
        key(seed, step, sample_ids),
        temperature,
        targets.data_ptr(),
        torch.get_num_threads(),
    )
    if offence[0]:
        _refuse(offence, None, teacher_rows, classes, teacher.shape[0], 0)
    return targets


def dkpp_permutation(
    argmax: Tensor,  # [R]
    sample_ids: Tensor | None,  # [R]
    step: Tensor | int,
    *,
    seed: int,
    num_classes: int,
) -> Tensor:
    """See `interface.Backend.dkpp_permutation`."""
    argmax, sample_ids = argmax.contiguous(), contiguous(sample_ids)
    rows = argmax.shape[0]
    sources = argmax.new_empty((rows, num_classes))
    _native.dkpp_permutation(
        argmax.data_ptr(), rows, num_classes, key(seed, step, sample_ids), sources.data_ptr(), torch.get_num_threads()
    )
    return sources


def scale_grad_(grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    """See `interface.Backend.scale_grad_`."""
    scale = 1.0 if grad_scale is None else grad_scale.item()
    each_row = grad_output.dim() == 1
    if not each_row and grad_output.item() * scale == 1.0:
        return grad
    rows, classes = grad.shape
    _native.scale_gradient(
        grad.data_ptr(),
        DTYPE[grad.dtype],
        rows,
        classes,
        grad_output.data_ptr(),
        grad_output.stride(0) if each_row else 0,
        scale,
        torch.get_num_threads(),
    )
    return grad


def empty_pool() -> None:
    """Give the memory that is kept for large results, and not in use, back to the system."""
    _native.empty_pool()


def _allocate(student: Tensor, reduction: Reduction, need_grad: bool, need_terms: bool) -> LossOutput:
    """Outputs without values. empty_like takes 0.7 us, new_empty 1 to 2.5: much, beside a small batch's 11 us."""
    dtype = student.dtype
    scalar = _SCALAR_64 if dtype == torch.float64 else _SCALAR_32
    loss = torch.empty_like(scalar) if reduction != "none" else student.new_empty(student.shape[:1], dtype=scalar.dtype)
    grad = grad_scale = None
    if need_grad:
        if student.nbytes >= _POOLED_FROM:
            grad = _pooled(student.shape, dtype)
        elif student.is_contiguous():
            grad = torch.empty_like(student)
        else:
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        if dtype == torch.float16:
            grad_scale = torch.empty_like(scalar)
    if not need_terms:
        return LossOutput(loss, _NO_TERM, _NO_TERM, grad, grad_scale)
    return LossOutput(loss, torch.empty_like(loss), torch.empty_like(loss), grad, grad_scale)


def _pooled(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without values, of memory from the pool (csrc/cpu/pool.h).

    Its storage keeps the block of the pool, so nobody else is given it while a view, a saved tensor or a parameter's
    .grad has that storage. Like memory of numpy's it cannot grow: resize_() to more elements is refused.
    """
    elements = shape.numel()
    block = _native.PooledMemory(elements * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=elements).view(shape)


def _refuse(
    offence: tuple[int, int],
    labels: Tensor | None,
    teacher_rows: Tensor | None,
    classes: int,
    teacher_size: int,
    ignore_index: int,
) -> None:
    what, row = offence
    if what == 1:
        assert labels is not None
        raise ValueError(
            f"labels: {int(labels[row])} in row {row} is out of range for {classes} classes "
            f"(ignore_index is {ignore_index})"
        )
    assert teacher_rows is not None
    raise ValueError(
        f"teacher_rows: {int(teacher_rows[row])} in row {row} is out of range for {teacher_size} teacher rows"
    )
