"""The CUDA kernels in the tests' emulator: built with the C++ compiler, and driven as ban_fast._native is.

`native_cuda` over CPU tensors is what this gives: the same Python, the same kernel sources, fibers for threads.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ban_fast.backends import native_cuda

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).parent / "emulator"
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-I", str(ROOT / "csrc"))


class Device(NamedTuple):
    """What the emulated device can do: bytes of shared memory, blocks in a cluster."""

    shared_of_block: int = 227 << 10
    shared_of_multiprocessor: int = 228 << 10
    cluster: int = 16
    seed: int = 1
    """Of the order in which threads and blocks run; 0: in theirs."""


def sources() -> list[Path]:
    return [path for path in sorted(KERNELS.glob("*.cu")) if path.name != "info.cu"]


def build(cache: Path, *options: str) -> Path:
    """The shared library, by several compilers at once; from `cache` where nothing it is made of has changed."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "ban_fast was built by a C++ compiler, and there is none"
    flags = [*FLAGS, *fused(), *options]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + " ".join(flags).encode())
    for path in sorted([*KERNELS.parent.glob("*.h"), *KERNELS.glob("*"), *EMULATOR.glob("*")]):
        digest.update(path.read_bytes())
    library = cache / f"{digest.hexdigest()[:16]}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    if library.exists():
        return library

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        directory = Path(name)

        def compiled(source: Path) -> str:
            target = directory / f"{source.stem}.o"
            kernel = ("-include", str(EMULATOR / "device.cuh"), "-x", "c++") if source.suffix == ".cu" else ()
            command = [compiler, *flags, *kernel, "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-6000:]
            return str(target)

        objects = list(pool.map(compiled, [*sources(), *sorted(EMULATOR.glob("*.cpp"))]))
        linked = cache / f"{directory.name}.{library.name}"
        subprocess.run([compiler, "-shared", *options, *objects, "-o", str(linked)], check=True)
        linked.replace(library)  # at once: another run may look for it
    return library


def fused() -> list[str]:
    """-mfma where the processor has it, so that `madd` rounds once, as on a GPU."""
    information = Path("/proc/cpuinfo")
    return ["-mfma"] if information.exists() and " fma " in information.read_text() else []


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
    ]


class _Selection(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("teacher_rows", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
    ]


class _Key(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("step_at", ctypes.c_void_p),
        ("sample_ids", ctypes.c_void_p),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_double),
        ("kd_weight", ctypes.c_double),
        ("label_weight", ctypes.c_double),
        ("cross_entropy", ctypes.c_bool),
        ("scale_t2", ctypes.c_bool),
        ("reduction", ctypes.c_int),
    ]


class _Result(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("loss", "kd", "label", "gradient", "grad_scale")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
    ]


class Emulated:
    """The functions cuda_* of ban_fast._native. An error of the emulator is a RuntimeError."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_error.restype = ctypes.c_char_p
        self._library.emulated_scratch.restype = ctypes.c_int64

    def configure(self, device: Device) -> None:
        self._library.emulated_device(*device)

    def cuda_info(self) -> dict[str, Any]:
        return {"built": True}

    def cuda_scratch(self) -> int:
        return int(self._library.emulated_scratch())

    def cuda_kd(self, student: Any, teacher: Any, rows: Any, options: Any, to: Any, launch: Any) -> None:
        self._distill(student, teacher, rows, None, options, to, launch)

    def cuda_dkpp(self, student: Any, teacher: Any, rows: Any, key: Any, options: Any, to: Any, launch: Any) -> None:
        self._distill(student, teacher, rows, key, options, to, launch)

    def _distill(self, student: Any, teacher: Any, rows: Any, key: Any, options: Any, to: Any, launch: Any) -> None:
        self._call(
            "emulated_kd",
            ctypes.byref(_Matrix(*student)),
            ctypes.byref(_Matrix(*teacher)),
            ctypes.byref(_Selection(*rows)),
            None if key is None else ctypes.byref(_Key(*key)),
            ctypes.byref(_Options(*options)),
            ctypes.byref(_Result(*to)),
            ctypes.byref(_Launch(*launch)),
        )

    def cuda_cwtm(
        self,
        student: Any,
        teacher: Any,
        confidence: Any,
        rows: Any,
        normalizer: int,
        by_label: bool,
        to: Any,
        launch: Any,
    ) -> None:
        self._call(
            "emulated_cwtm",
            ctypes.byref(_Matrix(*student)),
            None if confidence[0] else ctypes.byref(_Matrix(*teacher)),
            ctypes.byref(_Matrix(*confidence)) if confidence[0] else None,
            ctypes.c_void_p(normalizer),
            ctypes.c_bool(by_label),
            ctypes.byref(_Selection(*rows)),
            ctypes.byref(_Result(*to)),
            ctypes.byref(_Launch(*launch)),
        )

    def cuda_dkpp_targets(
        self, teacher: Any, rows: Any, key: Any, temperature: float, targets: int, launch: Any
    ) -> None:
        self._call(
            "emulated_dkpp_targets",
            ctypes.byref(_Matrix(*teacher)),
            ctypes.byref(_Selection(*rows)),
            ctypes.byref(_Key(*key)),
            ctypes.c_double(temperature),
            ctypes.c_void_p(targets),
            ctypes.byref(_Launch(*launch)),
        )

    def cuda_dkpp_permutation(self, argmax: int, rows: int, classes: int, key: Any, to: int, launch: Any) -> None:
        self._call(
            "emulated_dkpp_permutation",
            ctypes.c_void_p(argmax),
            ctypes.c_int64(rows),
            ctypes.c_int64(classes),
            ctypes.byref(_Key(*key)),
            ctypes.c_void_p(to),
            ctypes.byref(_Launch(*launch)),
        )

    def cuda_scale_gradient(
        self,
        gradient: int,
        dtype: int,
        rows: int,
        classes: int,
        factors: int,
        factor_stride: int,
        scale: int,
        launch: Any,
    ) -> None:
        self._call(
            "emulated_scale_gradient",
            ctypes.c_void_p(gradient),
            ctypes.c_int(dtype),
            ctypes.c_int64(rows),
            ctypes.c_int64(classes),
            ctypes.c_void_p(factors),
            ctypes.c_int64(factor_stride),
            ctypes.c_void_p(scale),
            ctypes.byref(_Launch(*launch)),
        )

    def mistake(self, number: int) -> int:
        """What a kernel with that mistake computes (emulator/mistakes.cpp)."""
        result = ctypes.c_int(-1)
        self._call("emulated_mistake", ctypes.c_int(number), ctypes.byref(result))
        return result.value

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, name)(*arguments) != 0:
            raise RuntimeError(self._library.emulated_error().decode())


@contextmanager
def installed(emulated: Emulated) -> Iterator[None]:
    """Makes `native_cuda` call the emulator, for tensors on the CPU."""
    workspaces: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    with (
        mock.patch.object(native_cuda, "_native", emulated),
        mock.patch.object(native_cuda, "_place", return_value=(0, 0)),
        mock.patch.object(native_cuda, "_workspaces", workspaces),
        mock.patch.object(native_cuda, "_counters", {}),
    ):
        yield
        # Every launch leaves its counter as it found it.
        assert all(int(counter) == 0 for _, counter in workspaces.values())
