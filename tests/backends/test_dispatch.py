"""Which backend serves a call, and what happens where one is missing."""

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from ban_fast.backends import dispatch, reference, table
from ban_fast.losses import KDLoss

LOGITS = torch.zeros(3, 4)


def clear() -> None:
    for cached in (dispatch._load, dispatch._resolve, dispatch._warn_of_fallback, table.measured):
        cached.cache_clear()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the names of backend modules import as: put a module, or an ImportError, there."""
    replaced: dict[str, Any] = {}
    import_module = importlib.import_module

    def imported(name: str, *rest: Any) -> Any:
        found = replaced.get(name.removeprefix("ban_fast.backends."))
        if isinstance(found, ImportError):
            raise found
        return found or import_module(name, *rest)

    monkeypatch.setattr(importlib, "import_module", imported)
    clear()
    yield replaced
    clear()


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Puts a table of fp32 KD in the place of the measured one: {(rows, classes): backend} on a device."""
    file = tmp_path / "table.json"
    monkeypatch.setattr(table, "FILE", file)

    def put(device: str, backends: dict[tuple[int, int], str]) -> None:
        found = [
            {"loss": "kd", "dtype": "float32", "rows": rows, "classes": classes, "backend": backend}
            for (rows, classes), backend in backends.items()
        ]
        part = {"machine": "Model X", "date": "2025-01-02", "cells": found}
        file.write_text(json.dumps({"devices": {device: part}}))
        clear()

    yield put
    clear()


def named(name: str, problem: str | None = None) -> Any:
    return SimpleNamespace(name=name, problem=lambda *device_type: problem)


def test_reference_serves_every_device() -> None:
    for device in ("cpu", "cuda", "meta"):
        assert dispatch.named("reference", device) is reference
        assert dispatch.available(device)["reference"] is None
    assert dispatch.resolve("reference", "kd", LOGITS) is reference


def test_backends_by_name_on_the_cpu() -> None:
    if dispatch.available()["native"] is not None:
        pytest.skip("ban_fast._native is not built")
    from ban_fast.backends import native

    for loss in ("kd", "cwtm", "dkpp"):
        assert dispatch.resolve("native", loss, LOGITS) is native
    with pytest.raises(ValueError, match=r"backend: 'native' is not available for 'meta' tensors: it serves CPU and"):
        dispatch.resolve("native", "kd", LOGITS.to("meta"))


def test_resolving_is_cheap() -> None:
    """0.35 us of the 65 us of a call at [128, 100]: from the second call of a kind on, sizes and a look-up."""
    dispatch.resolve("auto", "kd", LOGITS)
    called: list[str] = []

    def hear(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(hear)
    try:
        dispatch.resolve("auto", "kd", LOGITS)
    finally:
        sys.setprofile(before)
    assert called == ["resolve"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: 'refrence' is unknown; did you mean 'reference'\?"):
        dispatch.resolve("refrence", "kd", LOGITS)
    with pytest.raises(ValueError, match="backend: None is unknown"):
        dispatch.check_name(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'auto' depends on the call"):
        dispatch.named("auto", "cpu")


def test_backends_that_say_no_are_refused_with_their_reason(modules: dict[str, Any]) -> None:
    modules |= {"triton": named("triton", "no such GPU"), "native_cuda": ImportError("never built")}
    assert dispatch.available("cuda") == {"reference": None, "native": "never built", "triton": "no such GPU"}
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match="backend: 'triton' is not available for 'cuda' tensors: no such GPU; use"):
            dispatch.named("triton", "cuda")
        with pytest.raises(ValueError, match="backend: 'native' is not available for 'cuda' tensors: never built; use"):
            dispatch.named("native", "cuda")


def test_without_a_measurement_the_first_that_is_there_serves(
    modules: dict[str, Any], cells: Callable[..., None]
) -> None:
    cells("cpu", {(1, 1): "native"})
    key = ("auto", "kd", torch.device("cuda"), torch.float32, 8, 7)
    modules |= {"triton": named("triton"), "native_cuda": named("native")}
    assert dispatch._resolve(*key) is modules["triton"]
    modules["triton"] = named("triton", "no such GPU")
    clear()
    assert dispatch._resolve(*key) is modules["native_cuda"]
    modules["native_cuda"] = ImportError("never built")
    clear()
    with pytest.warns(RuntimeWarning, match="'cuda' tensors in plain PyTorch.*triton: no such GPU; native: never"):
        assert dispatch._resolve(*key) is reference
    assert dispatch._resolve("auto", "kd", torch.device("meta"), torch.float32, 8, 7) is reference


def test_auto_takes_the_nearest_cell(modules: dict[str, Any], cells: Callable[..., None]) -> None:
    cells("cpu", {(16, 10): "reference", (16, 1000): "native", (1024, 10): "native", (1024, 1000): "reference"})
    modules["native"] = native = named("native")
    for shape, expected in (
        ((16, 10), reference),
        ((0, 2), reference),
        ((100, 99), reference),
        ((16, 128), native),
        ((7, 10**6), native),
        ((128, 10), native),
        ((10**6, 10), native),
        ((300, 300), reference),
    ):
        assert dispatch.resolve("auto", "kd", torch.empty(shape, device="cpu")) is expected, shape


def test_what_a_table_names_may_be_missing_here(modules: dict[str, Any], cells: Callable[..., None]) -> None:
    cells("cuda", {(128, 100): "triton", (1024, 100): "reference"})
    modules |= {"triton": named("triton", "no such GPU"), "native_cuda": named("native")}
    cuda = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._resolve("auto", "kd", cuda, torch.float32, 8, 7) is modules["native_cuda"]
        assert dispatch._resolve("auto", "kd", cuda, torch.float32, 11, 7) is reference


def test_missing_native_falls_back_with_one_warning(modules: dict[str, Any]) -> None:
    modules["native"] = ImportError("there is no _native here")
    assert dispatch.available()["native"] == "there is no _native here"
    logits = torch.randn(3, 4)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch, slower \(native: there is no _native here\)") as caught:
        KDLoss()(logits, logits)
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KDLoss()(logits, logits)
        KDLoss()(torch.randn(300, 400), torch.randn(300, 400))
        assert dispatch.resolve("auto", "kd", logits) is reference


def test_missing_native_asked_for_by_name_is_an_error(modules: dict[str, Any]) -> None:
    modules["native"] = ImportError("there is no _native here")
    with pytest.raises(ValueError, match="backend: 'native' is not available for 'cpu' tensors: there is no _native"):
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
    assert result.stderr.count("RuntimeWarning: ban_fast computes losses") == 1


def test_auto_on_the_cpu_never_imports_triton() -> None:
    """It takes 0.1 s, and TRITON_INTERPRET is read then: who wants the interpreter asks for it by name."""
    code = (
        "import sys, torch, ban_fast.losses as losses\n"
        "losses.KDLoss()(torch.randn(3, 4), torch.randn(3, 4))\n"
        "print('ban_fast.backends.triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
