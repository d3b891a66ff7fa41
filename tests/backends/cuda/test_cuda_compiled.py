"""The CUDA sources compile for sm_80 and sm_90 without a warning, and no kernel keeps registers in memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_emulated import KERNELS, ROOT

ARCHITECTURES = ("80", "90")
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-Wall,-Wextra", "--Werror=all-warnings", "-Xptxas=-v")
NVCC = shutil.which("nvcc")


def demangled(name: str) -> str:
    """kernel<arguments>, from what ptxas calls it."""
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    full = subprocess.run([filt, name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"ban_fast::cuda::|\(anonymous namespace\)::|void ", "", full)
    return plain.partition("(")[0]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.stem)
def test_no_warnings_and_no_spills(source: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, *FLAGS, *code, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == (set(ARCHITECTURES) if source.stem != "info" else set())
    spilled = []
    for name, arch, stores, loads, registers in kernels:
        line = f"sm_{arch} {registers:>3} registers, spilled {stores} B, read back {loads} B: {demangled(name)}"
        print(line)
        if int(stores) or int(loads):
            spilled.append(line)
    assert not spilled
