"""Tests that ask for a GPU, on one that is emulated: the Python of it, with Triton's kernels interpreted."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WHOLE_STEPS = HERE / "training" / "test_whole_step_gpu.py"


def test_what_is_emulated() -> None:
    emulated(str(HERE / "test_emulated_gpu.py"))


def test_a_recorded_step_waits_for_nothing() -> None:
    emulated("-m", "gpu", str(WHOLE_STEPS), "-k", "waits_for_nothing and not large")


@pytest.mark.slow
def test_whole_steps() -> None:
    """In two processes: the interpreter has one thread."""
    halves = ["eagers_bits", "not eagers_bits"]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(emulated, "-m", "gpu", str(WHOLE_STEPS), "-k", half) for half in halves]
    for run in runs:
        run.result()


@pytest.mark.slow
def test_language_models() -> None:
    emulated("-m", "gpu", str(HERE / "models" / "test_models_lstm_gpu.py"))


@pytest.mark.slow
def test_loaders() -> None:
    emulated("-m", "gpu", str(HERE / "data"))


def emulated(*arguments: str) -> None:
    """Tests, in a process whose torch has the emulated GPU. None of them may be skipped."""
    environment = os.environ | {"BAN_FAST_EMULATED_GPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        *arguments,
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
