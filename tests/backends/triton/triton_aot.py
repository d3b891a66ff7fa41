"""Compiles what the launchers launch, for a GPU that is not there: the real launchers, the real specialisation of their
arguments, the real compiler, and a driver that says which GPU it is. Nothing runs; the tensors are on the CPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    """A kernel as a launch would have it."""

    name: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    """Its constexpr arguments and launch options."""
    binary: Any
    """triton.compiler.CompiledKernel"""

    @property
    def ptx(self) -> str:
        return str(self.binary.asm["ptx"])

    @property
    def shared(self) -> int:
        """Bytes of shared memory a program has."""
        return int(self.binary.metadata.shared)

    def resources(self) -> tuple[int, int]:
        """A thread's registers, and its bytes of local memory: what was spilled, since the kernels have no arrays."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
        assert found is not None, printed
        registers, stack, local = map(int, found.groups())
        return registers, stack + local


class _Driver:
    """Of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"compiled for sm_{self.capability}"  # compiled kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """Launches inside are compiled for sm_`capability`, not made, and end in the list."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = {p.name for p in self.params if not p.is_constexpr}
        found.append(Compiled(self.fn.__name__, grid, {k: v for k, v in kwargs.items() if k not in names}, binary))
        return binary

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(capability))
        patch.setattr(JITFunction, "run", compile_only)
        yield found


def specialisation(kernel: Compiled) -> str:
    """Argument types, constants, and attributes such as divisibility by 16."""
    source = kernel.binary.src
    return f"{source.signature} {source.constants} {source.attrs}"
