import importlib.util
import os

import pytest

from ban_fast.backends import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""In a process of its own, by test_triton_interpreted.py: Triton reads it when it is imported."""


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves CPU tensors. One that is built and cannot be used fails its tests."""
    name: str = request.param
    if name == "native" and importlib.util.find_spec("ban_fast._native") is None:
        pytest.skip("ban_fast._native is not built")
    assert dispatch.available()[name] is None
    return name
