"""What `ban-fast info` prints: what is there, and why not where it isn't."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import dispatch, table
from ..data import beton, cifar, ptb

_DISTRIBUTIONS = ("torch", "torchvision", "numpy", "triton")
_OPTIONAL = {"timm": "timm", "ray": "'ban_fast[ray]'"}
"""Packages, and what pip brings them by; FFCV needs more than pip."""


def lines(data_dir: str | None) -> Iterator[str]:
    """The lines, section by section."""
    root = Path(data_dir or os.environ.get("BAN_FAST_DATA") or "~/.cache/ban_fast").expanduser()
    for title, entries in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("backends of the losses", _backends()),
        ("several processes (torchrun)", {"backends": _communication()}),
        (f"datasets, in {root}", _datasets(root, data_dir)),
        ("optional packages", {name: _optional(name) for name in _OPTIONAL} | {"ffcv": _ffcv()}),
    ):
        yield title
        width = max(map(len, entries))
        yield from (f"  {name:<{width}}  {text}" for name, text in entries.items())


def _versions() -> dict[str, str]:
    versions = {"ban-fast": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _DISTRIBUTIONS}
    return versions | {"CPU in _native": _native_cpu(), "CUDA in _native": _native_cuda()}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _optional(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return f"not installed; `pip install {_OPTIONAL[package]}`"
    return _version(package)


def _ffcv() -> str:
    return beton.missing() or _version("ffcv")


def _native_cpu() -> str:
    """The instruction set of the native part's kernels on the CPU."""
    try:
        native: Any = importlib.import_module("ban_fast._native")
        native.PooledMemory(0)
        return str(native.instruction_set())
    except ImportError as error:
        return f"none: _native cannot be imported ({error})"
    except ValueError as error:  # of the environment variable BAN_FAST_ISA or BAN_FAST_POOL_MIB
        return f"none: {error}"


def _native_cuda() -> str:
    """The CUDA runtime that the native part carries."""
    try:
        native: Any = importlib.import_module("ban_fast._native")
    except ImportError as error:
        return f"none: _native cannot be imported ({error})"
    cuda = native.cuda_info()
    if not cuda["built"]:
        return "none: there was no nvcc when it was built"
    number = cuda["runtime_version"]  # 1000 * major + 10 * minor
    targets = ", ".join(f"sm_{target}" for target in cuda["architectures"].replace(",", ";").split(";"))
    return f"runtime {number // 1000}.{number % 1000 // 10} for {targets}"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{torch.get_num_threads()} threads, {capability}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        devices["cuda"] = f"none ({build})"
    return devices


def _backends() -> dict[str, str]:
    found = {}
    for device in dispatch.PRIOR:
        for name, problem in dispatch.available(device).items():
            found[f"{name} on {device}"] = "there" if problem is None else f"not there: {problem}"
        found[f"auto on {device}"] = _auto(device)
    return found


def _auto(device: str) -> str:
    """What backend="auto" follows on a type of device."""
    measured = table.measured(device)
    if measured is None:
        return f"not measured on this device: {', else '.join(dispatch.PRIOR[device])}"
    cells = Counter(backend for shapes in measured.fastest.values() for backend in shapes.values())
    count = ", ".join(f"{name} in {number}" for name, number in cells.most_common())
    return f"{count} of {cells.total()} cells, measured {measured.date[:10]} on {measured.machine}"


def _communication() -> str:
    """What processes of one run talk over."""
    if not torch.distributed.is_available():
        return "none: this torch is built without torch.distributed"
    gloo = "gloo for CPUs" if torch.distributed.is_gloo_available() else "no gloo: not in this torch"
    if not torch.distributed.is_nccl_available():
        return f"{gloo}; no NCCL for GPUs: not in this torch"
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return f"{gloo}; NCCL {version} for GPUs, {torch.cuda.device_count() or 'none'} here"


def _datasets(root: Path, data_dir: str | None) -> dict[str, str]:
    found = {"digits": "bundled"}
    where = "" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}"
    places = {name: cifar.locate(published, root) for name, published in cifar.CIFAR.items()}
    for name, place in (places | {"ptb": ptb.locate(root)}).items():
        found[name] = f"not there; `ban-fast prepare {name}{where}` downloads it" if place is None else str(place)
    return found
