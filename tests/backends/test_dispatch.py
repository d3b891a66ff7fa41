"""Which backend serves a call, and what happens where one is missing."""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ban_fast.backends import dispatch, reference
from ban_fast.losses import KDLoss

CPU = torch.device("cpu")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the package was never built."""
    import_module = importlib.import_module

    def refuse(name: str, *rest: Any) -> Any:
        if name == "ban_fast.backends.native":
            raise ImportError("there is no _native here")
        return import_module(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    dispatch._native.cache_clear()
    dispatch._resolve.cache_clear()
    yield
    dispatch._native.cache_clear()
    dispatch._resolve.cache_clear()


def test_reference_serves_every_device() -> None:
    for device in ("cpu", "cuda", "meta"):
        assert dispatch.resolve("reference", torch.device(device)) is reference
    assert dispatch.available()["reference"] is None


def test_auto_is_native_on_the_cpu_and_reference_elsewhere() -> None:
    if dispatch.available()["native"] is not None:
        pytest.skip("ban_fast._native is not built")
    from ban_fast.backends import native

    assert dispatch.resolve("auto", CPU) is native
    assert dispatch.resolve("native", CPU) is native
    assert dispatch.resolve("auto", torch.device("cuda")) is reference
    with pytest.raises(ValueError, match=r"backend: 'native' serves CPU tensors, and these are on 'cuda'"):
        dispatch.resolve("native", torch.device("cuda"))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: 'refrence' is unknown; did you mean 'reference'\?"):
        dispatch.resolve("refrence", CPU)
    with pytest.raises(ValueError, match="backend: None is unknown"):
        dispatch.check_name(None)


@pytest.mark.usefixtures("without_native")
def test_missing_native_falls_back_with_one_warning() -> None:
    assert dispatch.available() == {"reference": None, "native": "there is no _native here"}
    logits = torch.randn(3, 4)
    with pytest.warns(RuntimeWarning, match="plain PyTorch, slower: there is no _native here") as caught:
        KDLoss()(logits, logits)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KDLoss()(logits, logits)
        assert dispatch.resolve("auto", CPU) is reference


@pytest.mark.usefixtures("without_native")
def test_missing_native_asked_for_by_name_is_an_error() -> None:
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match="backend: 'native' is not available: there is no _native here"):
            KDLoss(backend="native")(torch.randn(3, 4), torch.randn(3, 4))


def test_a_package_that_was_not_built_still_computes() -> None:
    """In a process of its own, where the extension itself cannot be imported."""
    code = (
        "import sys, warnings\n"
        "sys.modules['ban_fast._native'] = None\n"
        "warnings.simplefilter('always')\n"
        "import torch, ban_fast.losses as losses\n"
        "from ban_fast.backends import dispatch\n"
        "z = torch.randn(3, 4, requires_grad=True)\n"
        "for _ in range(3): losses.KDLoss(4.0)(z, torch.randn(3, 4)).backward()\n"
        "print(dispatch.available()['native'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() not in ("", "None")
    assert result.stderr.count("RuntimeWarning") == 1
