"""Tests that ask for a GPU, on one that is emulated: the Python of it, with Triton's kernels interpreted."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRITON = HERE / "backends" / "triton"
LOSSES = TRITON / "test_triton_gpu.py"
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
@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (10, ["kd", "kd, rows", "kd, none", "cwtm", "cwtm, label", "cwtm, given", "dkpp"]),
        (100, ["kd, rows", "cwtm"]),
    ],
)
def test_losses_are_recorded_and_wait_for_nothing(classes: int, names: list[str]) -> None:
    """Rows of which a program has many, and rows of one warp; more would take long to interpret."""
    replays, waits = (
        f"{LOSSES}::test_{test}" for test in ("a_captured_graph_replays_to_eager_s_bits", "the_host_never_waits")
    )
    cases = [f"{replays}[{name}-{classes}-dtype{dtype}]" for name in names for dtype in (0, 1)]
    emulated("-m", "gpu", *cases, *(f"{waits}[{name}-{classes}]" for name in names))


@pytest.mark.slow
def test_dense_blocks() -> None:
    names = ("test_no_host_sync_in_a_step", "test_eval_mode_and_no_grad")
    emulated("-m", "gpu", *(f"{TRITON / 'test_triton_dense_gpu.py'}::{name}" for name in names))


@pytest.mark.slow
def test_augmentation() -> None:
    emulated("-m", "gpu", f"{TRITON / 'test_triton_images_gpu.py'}::test_batches_are_the_cpus")


@pytest.mark.slow
def test_folded_teachers() -> None:
    emulated("-m", "gpu", f"{HERE / 'training' / 'test_teacher_folding_gpu.py'}::test_live_cached_and_recorded")


@pytest.mark.slow
def test_language_models() -> None:
    emulated("-m", "gpu", "-k", "not cudnn", str(HERE / "models" / "test_models_lstm_gpu.py"))


@pytest.mark.slow
def test_runs_of_language_models() -> None:
    emulated("-m", "gpu", str(HERE / "training" / "test_text_run_gpu.py"))


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
