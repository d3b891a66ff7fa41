"""Runs the kernels' contract in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent / "contract"


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_contract_holds_in_the_interpreter(marker: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, str(CONTRACT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
