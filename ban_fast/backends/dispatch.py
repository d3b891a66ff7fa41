"""Which backend serves a call."""

import importlib
import warnings
from functools import cache
from typing import cast

import torch

from ban_fast.backends import reference
from ban_fast.backends.interface import Backend
from ban_fast.errors import suggest

NAMES = ("auto", "reference", "native")


def check_name(backend: str) -> None:
    """ValueError where `backend` is not a backend's name."""
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is unknown{suggest(str(backend), NAMES)}")


def available() -> dict[str, str | None]:
    """Every backend's name: None where it can be used, else the reason why it cannot."""
    return {"reference": None, "native": _native()[1]}


def resolve(backend: str, device: torch.device) -> Backend:
    """The backend called `backend` for tensors on `device`; "auto" is native on the CPU, reference elsewhere.

    ValueError where it is unknown, not there, or has no kernels for that device. Where "auto" would be native, and
    native is missing, reference serves and one warning says so.
    """
    return _resolve(backend, device.type)


@cache
def _resolve(backend: str, device_type: str) -> Backend:
    check_name(backend)
    if backend == "reference" or (backend == "auto" and device_type != "cpu"):
        return cast(Backend, reference)
    native, problem = _native()
    if native is None and backend == "auto":
        warnings.warn(f"ban_fast computes its losses in plain PyTorch, slower: {problem}", RuntimeWarning, stacklevel=4)
        return cast(Backend, reference)
    if native is None:
        raise ValueError(f"backend: 'native' is not available: {problem}; use 'auto' or 'reference'")
    if device_type != "cpu":
        raise ValueError(f"backend: 'native' serves CPU tensors, and these are on {device_type!r}; use 'auto'")
    return native


@cache
def _native() -> tuple[Backend | None, str | None]:
    """The native backend, or why there is none."""
    try:
        return cast(Backend, importlib.import_module("ban_fast.backends.native")), None
    except ImportError as error:
        return None, str(error)
