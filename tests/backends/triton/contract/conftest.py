import os

import pytest
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
    """Once is enough to patch triton.language; the interpreter does so at every call in a kernel, 5 ms each."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(self: object, *args: object, **kwargs: object) -> object:
        names = id(self.fn.__globals__)  # type: ignore[attr-defined]
        if names not in patched:
            patched.add(names)
            interpreter._patch_lang(self.fn)  # type: ignore[attr-defined]
        return self.rewrite()(*args, **kwargs)  # type: ignore[attr-defined]

    interpreter.InterpretedFunction.__call__ = call
