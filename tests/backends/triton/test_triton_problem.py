"""Where the Triton backend cannot be used, and what it says then."""

import os
import subprocess
import sys

import pytest
import torch

from ban_fast.backends import triton


def output_of(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_without_triton_the_import_says_so() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "try: import ban_fast.backends.triton\n"
        "except ImportError as error: print(error)"
    )
    assert output_of(code).startswith("Triton is not installed")


def test_other_backends_do_not_import_triton() -> None:
    code = "import sys, ban_fast.losses; print('ban_fast.backends.triton' in sys.modules)"
    assert output_of(code) == "False"


def test_the_cpu_needs_the_interpreter() -> None:
    problem = triton.problem("cpu")
    assert problem is not None
    assert "TRITON_INTERPRET=1" in problem
    ask = "from ban_fast.backends import triton; print(triton.problem('cpu'), triton.problem('cuda'))"
    on_cpu, _, on_cuda = output_of(ask, TRITON_INTERPRET="1").partition(" ")
    assert on_cpu == "None"
    assert "TRITON_INTERPRET=1" in on_cuda


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that PyTorch is made to find."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    return found


def test_gpus(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.problem("cuda") == "PyTorch finds no CUDA device"
    gpus += [(8, 0), (9, 0), (12, 0)]
    assert triton.problem("cuda") is None
    gpus.append((7, 5))
    problem = triton.problem("cuda")
    assert problem is not None
    assert "cuda:3 (GPU 3)" in problem
    assert "7.5" in problem
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(triton.problem("cuda"))


def test_other_devices_are_named() -> None:
    assert "'xpu'" in str(triton.problem("xpu"))
