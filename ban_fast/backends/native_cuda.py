"""The native backend for CUDA tensors (csrc/cuda): this module allocates and hands addresses and a stream over.

The functions of `interface.Backend`. Nothing waits for the device, and all of it can be captured in a CUDA graph.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

import ban_fast.backends.native  # noqa: F401  its ImportError says what to do where `_native` is not, or is another's
from ban_fast import _native
from ban_fast.backends.addresses import DTYPE, NO_MATRIX, REDUCTION, address, contiguous, key, matrix, result, selection
from ban_fast.backends.interface import Divergence, LossOutput, Reduction, WeightBy, acc_dtype
from ban_fast.backends.lasting import lasting

_CAPTURED_CALLS = 1 << 15
"""Calls captured in CUDA graphs that can have a counter of the device's block; a later one's graph zeroes its own."""

_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
"""Scratch and counter of each device's streams."""
_counters: dict[int, Iterator[Tensor]] = {}
"""A device's counters that no captured call has yet."""


def problem() -> str | None:
    """Why these kernels cannot be used here, or None."""
    built = _native.cuda_info()
    if not built["built"]:
        return "ban_fast._native was built without CUDA: install where nvcc is on the PATH"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if built["devices"] == 0:
        return f"the CUDA runtime linked in, {built['runtime_version']}, finds no device: the driver is older"
    least = min(int(digits) for digits in re.findall(r"\d+", built["architectures"]))
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < max(80, least):
            return f"cuda:{index} has compute capability {major}.{minor}; built for {built['architectures']}"
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
    """See `interface.Backend.kd`. One launch; one more, before it, counts the rows kept of more than 4096 labels."""
    output = _allocate(student, reduction, need_grad)
    if student.shape[0] == 0:
        return output.of_no_rows()
    labels, teacher_rows = contiguous(labels), contiguous(teacher_rows)
    place = _place(student.device)
    scratch, counter = _workspace(student.device, place)
    _native.cuda_kd(
        matrix(student),
        matrix(teacher),
        selection(student, labels, teacher_rows, ignore_index),
        (temperature, kd_weight, label_weight, divergence == "ce", scale_t2, REDUCTION[reduction]),
        result(output),
        _launch(place, scratch, counter),
    )
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
    """See `interface.Backend.dkpp`. Launches as `kd`."""
    output = _allocate(student, reduction, need_grad)
    if student.shape[0] == 0:
        return output.of_no_rows()
    labels, teacher_rows, sample_ids = contiguous(labels), contiguous(teacher_rows), contiguous(sample_ids)
    place = _place(student.device)
    scratch, counter = _workspace(student.device, place)
    _native.cuda_dkpp(
        matrix(student),
        matrix(teacher),
        selection(student, labels, teacher_rows, ignore_index),
        _keyed(seed, step, sample_ids),
        (temperature, kd_weight, label_weight, divergence == "ce", scale_t2, REDUCTION[reduction]),
        result(output),
        _launch(place, scratch, counter),
    )
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
    """See `interface.Backend.cwtm`. One launch with `confidence`, from the teacher's logits two; one more, before the
    loss's, adds up the confidences of more than 4096 rows."""
    output = _allocate(student, "sum", need_grad)
    if student.shape[0] == 0:
        return output.of_no_rows()
    labels, teacher_rows = labels.contiguous(), contiguous(teacher_rows)
    source = teacher if confidence is None else confidence.unsqueeze(1)
    assert source is not None, "cwtm needs the teacher's logits or its confidence"
    place = _place(student.device)
    scratch, counter = _workspace(student.device, place)
    if confidence is None:
        scratch = _scratch(student.device, student.shape[0])
    _native.cuda_cwtm(
        matrix(student),
        matrix(source) if confidence is None else NO_MATRIX,
        NO_MATRIX if confidence is None else matrix(source),
        selection(student, labels, teacher_rows, ignore_index),
        address(normalizer),
        weight_by == "teacher_label",
        result(output),
        _launch(place, scratch, counter),
    )
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
    rows = teacher.shape[0] if teacher_rows is None else teacher_rows.shape[0]
    targets = teacher.new_empty((rows, teacher.shape[1]), dtype=acc_dtype(teacher.dtype))
    if rows == 0:
        return targets
    teacher_rows, sample_ids = contiguous(teacher_rows), contiguous(sample_ids)
    _native.cuda_dkpp_targets(
        matrix(teacher),
        (rows, teacher.shape[1], 0, address(teacher_rows), 0),
        _keyed(seed, step, sample_ids),
        temperature,
        targets.data_ptr(),
        _launch(_place(teacher.device)),
    )
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
    if rows == 0:
        return sources
    _native.cuda_dkpp_permutation(
        argmax.data_ptr(),
        rows,
        num_classes,
        _keyed(seed, step, sample_ids),
        sources.data_ptr(),
        _launch(_place(argmax.device)),
    )
    return sources


def scale_grad_(grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    """See `interface.Backend.scale_grad_`. One launch, which reads grad_output on the device."""
    rows, classes = grad.shape
    if rows == 0:
        return grad
    _native.cuda_scale_gradient(
        grad.data_ptr(),
        DTYPE[grad.dtype],
        rows,
        classes,
        grad_output.data_ptr(),
        grad_output.stride(0) if grad_output.dim() == 1 else 0,
        address(grad_scale),
        _launch(_place(grad.device)),
    )
    return grad


def _allocate(student: Tensor, reduction: Reduction, need_grad: bool) -> LossOutput:
    """Outputs without values."""
    loss = student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=acc_dtype(student.dtype))
    grad = grad_scale = None
    if need_grad:
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        if student.dtype == torch.float16:
            grad_scale = student.new_empty((), dtype=loss.dtype)
    return LossOutput(loss, torch.empty_like(loss), torch.empty_like(loss), grad, grad_scale)


def _keyed(seed: int, step: Tensor | int, sample_ids: Tensor | None) -> tuple[int, int, int, int]:
    """Seed, step, the address of a step that is a tensor, and of the ids."""
    if isinstance(step, Tensor):
        words = key(seed, 0, sample_ids)
        return words[0], 0, step.data_ptr(), words[2]
    words = key(seed, step, sample_ids)
    return words[0], words[1], 0, words[2]


def _place(device: torch.device) -> tuple[int, int]:
    """The device's index, and the address of its current stream."""
    assert device.index is not None
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _launch(
    place: tuple[int, int], scratch: Tensor | None = None, counter: Tensor | None = None
) -> tuple[int, int, int, int]:
    """Device, and the addresses of stream, scratch and counter."""
    return *place, address(scratch), address(counter)


def _workspace(device: torch.device, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scratch that a loss's blocks leave their sums in, and the counter, 0, by which they know the last of them.

    Launches on one stream follow one another and share them. A captured launch may run beside any other: it has a
    counter to itself, for as long as the process lives, and scratch of its graph's memory. The block of these is 0 once
    what any stream's first call waits for is there, and a graph is replayed after the calls that warmed it up.
    """
    index = place[0]
    if _is_capturing(device):
        counter = next(_counters[index], None) if index in _counters else None
        return _scratch(device), _zero(device) if counter is None else counter
    if place not in _workspaces:
        if index not in _counters:
            block = lasting(lambda: torch.zeros(_CAPTURED_CALLS, dtype=torch.int32, device=device), device)
            _counters[index] = (block[i] for i in range(_CAPTURED_CALLS))
        scratch, counter = lasting(lambda: _scratch(device), device), lasting(lambda: _zero(device), device)
        _workspaces[place] = scratch, counter
    return _workspaces[place]


def _scratch(device: torch.device, rows: int = 0) -> Tensor:
    return torch.empty(_native.cuda_scratch() + rows, dtype=torch.float64, device=device)


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=device)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
