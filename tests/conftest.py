"""Settings that must be made before torch, typer and rich are first imported, and the backends that losses have."""

import importlib.util
import os
import shutil
import tempfile

import pytest

# torch's OpenMP threads spin while they wait, and starve the processes that tests start on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# On a GPU, cuBLAS's products are refused without it where a test asks for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Where one of these is set, as some CI systems do, help and tables are coloured though they go to no terminal.
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)

EMULATED = os.environ.get("BAN_FAST_EMULATED_GPU") == "1"
"""In a process of its own, by test_on_the_emulated_gpu.py: torch has the emulated GPU."""
if EMULATED:
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore = [] if EMULATED else ["test_emulated_gpu.py"]

# Inductor keeps graphs on disk by what they call. One of a processor with wider vectors, or of operators as they were
# before, is found again and computes something else: nothing that another run left is used.
_COMPILED = tempfile.mkdtemp(prefix="compiled_by_tests_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED


@pytest.fixture(autouse=True)
def _the_same_draws() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""In a process of its own, by test_triton_interpreted.py: Triton reads it when it is imported."""


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves CPU tensors. One that is built and cannot be used fails its tests."""
    from ban_fast.backends import dispatch

    name: str = request.param
    if name == "native" and importlib.util.find_spec("ban_fast._native") is None:
        pytest.skip("ban_fast._native is not built")
    assert dispatch.available()[name] is None
    return name


def pytest_configure() -> None:
    if EMULATED:
        import emulated_torch

        emulated_torch.install()


def pytest_unconfigure() -> None:
    shutil.rmtree(_COMPILED, ignore_errors=True)
