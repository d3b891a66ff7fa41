"""Which backend serves a call."""

import importlib
import warnings
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ban_fast.backends import table
from ban_fast.backends.interface import Backend
from ban_fast.errors import suggest

BACKENDS = ("reference", "native", "triton")
NAMES = ("auto", *BACKENDS)

# Where nothing has been measured, and where what the table names is not there: the first that is. Of the kernels for
# GPUs Triton's are proven in its interpreter and native's in the tests' emulator; Triton's suit any device.
PRIOR = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}


def check_name(backend: str) -> None:
    """ValueError where `backend` is not a backend's name."""
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is unknown{suggest(str(backend), NAMES)}")


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend's name: None where it serves tensors on such devices, else the reason why it cannot."""
    return {name: _load(name, device_type)[1] for name in BACKENDS}


def check_environment() -> None:
    """UserError for a variable of the environment that a backend reads, with a value that it does not take."""
    native: Any = _load("native", "cpu")[0]
    if native is not None:
        native.check_environment()


def resolve(backend: str, loss: str, logits: Tensor) -> Backend:
    """The backend that computes `loss` ("kd", "cwtm" or "dkpp") for logits [R, C].

    "auto" follows the table of measured times, `PRIOR` where there is none for the device. What it wants may be
    missing: then the next of `PRIOR` serves, and where that is the reference one warning says so.
    ValueError where `backend` is unknown, or named and not there. A call costs 0.5 us: by the device itself, since
    asking it for its type costs another 0.25 us.
    """
    rows, classes = logits.shape
    try:
        row_bits, class_bits = rows.bit_length(), classes.bit_length()
    except AttributeError as error:  # there sizes are tensors
        raise RuntimeError(
            "torch.jit.trace cannot see into a ban_fast loss: use torch.compile or torch.export"
        ) from error
    try:
        return _resolve(backend, loss, logits.device, logits.dtype, row_bits, class_bits)
    except TypeError:  # a list, say, cannot be looked up
        check_name(backend)
        raise


def named(backend: str, device_type: str) -> Backend:
    """The backend of that name for tensors on such devices; ValueError where it is unknown or not there."""
    check_name(backend)
    if backend == "auto":
        raise ValueError("backend: 'auto' depends on the call, and no call was given")
    module, problem = _load(backend, device_type)
    if module is None:
        raise ValueError(
            f"backend: {backend!r} is not available for {device_type!r} tensors: {problem}; use 'auto' or 'reference'"
        )
    return module


def wishes(loss: str, device_type: str, dtype: torch.dtype, size: table.SizeClass) -> tuple[str, ...]:
    """What "auto" tries, in this order."""
    prior = PRIOR.get(device_type, ("reference",))
    measured = table.measured(device_type)
    return prior if measured is None else (measured.backend(loss, dtype, size), *prior)


@cache
def _resolve(
    backend: str, loss: str, device: torch.device, dtype: torch.dtype, row_bits: int, class_bits: int
) -> Backend:
    device_type = device.type
    if backend != "auto":
        return named(backend, device_type)
    tried = wishes(loss, device_type, dtype, (row_bits, class_bits))
    chosen = next(name for name in tried if _load(name, device_type)[1] is None)
    if chosen == "reference" != tried[0]:
        _warn_of_fallback(device_type)
    return named(chosen, device_type)


@cache
def _warn_of_fallback(device_type: str) -> None:
    problems = {name: _load(name, device_type)[1] for name in PRIOR[device_type] if name != "reference"}
    why = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    message = f"ban_fast computes losses of {device_type!r} tensors in plain PyTorch, slower ({why})"
    warnings.warn(message, RuntimeWarning, stacklevel=5)


@cache
def _load(backend: str, device_type: str) -> tuple[Backend | None, str | None]:
    """A backend's module for a type of device, or why there is none."""
    module = "native_cuda" if (backend, device_type) == ("native", "cuda") else backend
    if backend == "native" and device_type not in ("cpu", "cuda"):
        return None, "it serves CPU and CUDA tensors"
    try:
        found: Any = importlib.import_module(f"ban_fast.backends.{module}")
    except ImportError as error:
        return None, str(error)
    problem: str | None = None
    if module == "native_cuda":
        problem = found.problem()
    elif module == "triton":
        problem = found.problem(device_type)
    return (cast(Backend, found), None) if problem is None else (None, problem)
