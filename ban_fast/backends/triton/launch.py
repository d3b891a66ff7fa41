"""What every launcher needs around its kernel: device, strides, arithmetic, and the counter that ends a reduction."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ban_fast.backends.interface import LossOutput
from ban_fast.backends.lasting import lasting, made_apart
from ban_fast.backends.triton.row_math import ANY, LOG2_E, POWER_OF_TWO, UNIT

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True, "num_stages": 1}
"""Of every launch. Multiplications may fuse with additions: the exact differences have no multiplication in them."""

_CAPTURED_CALLS = 1 << 15
"""Calls captured in CUDA graphs that can have a counter of their own; later ones set theirs to 0 in a launch of its own."""
_COUNTER_STRIDE = 8
"""32 bytes, a sector of the L2 cache each."""


class _Spare(NamedTuple):
    """A device's counters that no stream and no captured call has: of one block, held for good."""

    counters: Iterator[Tensor]
    zeroed: torch.cuda.Event
    """For which every stream waits before it counts: the block is set to 0 on the default stream, behind its work."""


_stream_counters: dict[tuple[int | None, int], Tensor] = {}
_spare_counters: dict[int | None, _Spare] = {}


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def arithmetic(tensor: Tensor) -> tuple[torch.dtype, Any]:
    """The type everything is computed in, for torch and for Triton."""
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def alignment(num_classes: int, *matrices: Tensor | None) -> int:
    """The largest power of two, at most 16, that divides the classes and every row stride: a kernel's vector width."""
    return math.gcd(16, num_classes, *(m.stride(0) for m in matrices if m is not None and m.shape[0] > 1))


def contiguous(*matrices: Tensor | None) -> bool:
    """Whether neighbouring classes are neighbours in memory."""
    return all(m is None or m.stride(1) == 1 or m.shape[1] == 1 for m in matrices)


def half_bits(*matrices: Tensor) -> bool:
    return all(m.dtype in (torch.float16, torch.bfloat16) for m in matrices)


def empty_output(student: Tensor, shape: tuple[int, ...], need_grad: bool) -> LossOutput:
    """Memory for a loss of `shape`, its terms and the gradient."""
    dtype, _ = arithmetic(student)
    loss, kd, label = (torch.empty(shape, dtype=dtype, device=student.device) for _ in range(3))
    return LossOutput(
        loss,
        kd,
        label,
        torch.empty(student.shape, dtype=student.dtype, device=student.device) if need_grad else None,
        torch.empty((), dtype=dtype, device=student.device) if need_grad and student.dtype == torch.float16 else None,
    )


def dense(vector: Tensor | None) -> Tensor | None:
    """Labels and other vectors as the kernels take them: next to one another."""
    return None if vector is None else vector.contiguous()


def bits(double: bool, **values: float) -> dict[str, Any]:
    """The values' bits, in fp64 or in fp32, as 64-bit arguments: these are typed once for all dtypes, and fp32 values that
    came as fp64 would each hold a register for as long as a kernel runs."""
    numbers = (ctypes.c_double if double else ctypes.c_float) * len(values)
    words = memoryview(numbers(*values.values())).cast("B").cast("q" if double else "i")
    return dict(zip(values, words, strict=True))


def heat(temperature: float, double: bool) -> dict[str, Any]:
    """A kernel's arguments for T."""
    return bits(double, temperature=temperature, inverse=1 / temperature, exp_scale=LOG2_E.value / temperature)


def heat_kind(temperature: float) -> int:
    """How `row_math.tempered` divides by T: its inverse is exact where T is a power of two."""
    exact = math.frexp(temperature)[0] == 0.5
    kind: int = (UNIT if temperature == 1 else POWER_OF_TWO if exact else ANY).value
    return kind


@cache
def multiprocessors(device: torch.device) -> int:
    """2 in the interpreter, so that a program has several rows there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have; in the interpreter as much as an A100's."""
    if device.type != "cuda":
        return 166_912
    properties: Any = torch.cuda.get_device_properties(device)  # some of torch's types leave this one out
    return int(properties.shared_memory_per_block_optin)


def counter(device: torch.device) -> Tensor:
    """A 0 that the programs of one launch count up, and its last one sets back.

    Launches on one stream follow one another and share a counter; PyTorch takes its streams from a pool and destroys none.
    A captured launch may run beside any other, so it has a counter to itself for as long as the process lives (a graph's
    own launches do not overlap: replays of one graph follow one another). These are 0 before any graph runs:
    `torch.cuda.graph` waits for the device before it captures. `CUDAGraph.capture_begin` does not, and a capture can wait
    for no event from outside; but a graph is replayed after the calls that warmed it up, and their stream has waited.
    Where there are none left, or none yet, the graph sets one of its own memory to 0, in a launch more. A counter's place
    is divisible by 16 everywhere, since a kernel compiled for other places could not be loaded while a graph is captured.
    """
    if device.type != "cuda":
        return torch.zeros((), dtype=torch.int32, device=device)
    index = device.index
    if torch.cuda.is_current_stream_capturing():
        own = next(_spare_counters[index].counters, None) if index in _spare_counters else None
        return torch.zeros((), dtype=torch.int32, device=device) if own is None else own
    stream = torch.cuda.current_stream(device)
    key = (index, stream.cuda_stream)
    if key not in _stream_counters:
        _stream_counters[key] = _counter_of(stream, device)
    return _stream_counters[key]


def _counter_of(stream: torch.cuda.Stream, device: torch.device) -> Tensor:
    """For the current stream, that has none yet."""
    if device.index not in _spare_counters:
        shape = (_CAPTURED_CALLS, _COUNTER_STRIDE)
        block, zeroed = made_apart(lambda: torch.zeros(shape, dtype=torch.int32, device=device), device)
        _spare_counters[device.index] = _Spare((block[i, 0] for i in range(_CAPTURED_CALLS)), zeroed)
    spare = _spare_counters[device.index]
    own = next(spare.counters, None)
    if own is None:
        return lasting(lambda: torch.zeros((), dtype=torch.int32, device=device), device)
    stream.wait_event(spare.zeroed)
    return own
