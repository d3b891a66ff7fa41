"""The Triton kernels in Triton's interpreter, on the CPU. What only a GPU can show is not shown here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch where torch is built for CUDA)")

# Values and gradients: fp32 as promised. Half precision is one rounding of the gradient, the interpreter's to bf16
# truncates: a whole unit in the last place, where a GPU rounds to half of one.
LIMITS = {"float32": 2e-6, "float64": 1e-11, "float16": 2**-10, "bfloat16": 2**-7}


def run(*cases: str) -> dict[str, Any]:
    """The answer of triton_cases.py, in a process where the interpreter was asked for before Triton's import."""
    script = Path(__file__).with_name("triton_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def check(*cases: str) -> None:
    errors = run(*cases)
    kinds = {case.split(":")[1] for case in cases}
    assert len(errors) == 2 * 3 * sum(2 if kind in ("float32", "float64") else 1 for kind in kinds)
    for what, error in errors.items():
        _, kind, _, of = what.split()
        limit = LIMITS[kind] if of == "gradient" or kind == "float64" else 1e-5
        assert error < limit, f"{what}: {error}"


def test_corners() -> None:
    held = run()
    assert len(held) >= 20
    assert [what for what, holds in held.items() if not holds] == []


def test_losses_against_float64() -> None:
    check("10:float32", "101:float32", "10:float16")


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 99, 1000])
def test_every_dtype_against_float64(classes: int) -> None:
    check(*(f"{classes}:{kind}" for kind in LIMITS))
