"""Runs the kernels' contract in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent / "contract"
LOSSES = Path(__file__).parents[2] / "losses"
OPERATORS = Path(__file__).parents[2] / "ops" / "test_opcheck.py"


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_contract_holds_in_the_interpreter(marker: str) -> None:
    """In two processes: the interpreter has one thread."""
    files = sorted(CONTRACT.glob("test_*.py"), key=lambda file: file.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(interpreted, "-m", marker, *map(str, files[i::2])) for i in range(2)]
    for half in halves:
        half.result()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checks", "autograd", "transforms"])
def test_the_public_losses_in_the_interpreter(name: str) -> None:
    interpreted(str(LOSSES / f"test_losses_{name}.py"))


@pytest.mark.slow
def test_the_operators_in_the_interpreter() -> None:
    interpreted(str(OPERATORS))


def interpreted(*arguments: str) -> None:
    """Tests, in a process whose Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
