import os

import pytest
import quick_interpreter
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "contract" in item.path.parts and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))  # numpy's, of inf - inf


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here: interpreted on the CPU, or on the GPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def quick_calls() -> None:
    if INTERPRETED:
        quick_interpreter.install()
