"""Which implementation of a dense block serves which tensors."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from ban_fast.backends import dense_block, dense_dispatch
from ban_fast.backends.dense_shape import Shape


def on_cuda(dtype: torch.dtype, elements: int = 8) -> SimpleNamespace:
    """What `dense_dispatch` asks a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, numel=lambda: elements)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("kernels")
    monkeypatch.setattr(dense_dispatch, "_triton", lambda: module)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", [4, 33])
def test_a_pixels_features_begin_where_16_bytes_do(growth: int, dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 3, 7, 3, 4 * growth, growth, dtype, torch.device("cpu"))
    features = shape.features()
    assert features.shape == (2, 3, 3, 7 + 3 * growth)
    assert features.stride(2) * dtype.itemsize % 16 == 0
    assert features.stride(2) * dtype.itemsize < (7 + 3 * growth) * dtype.itemsize + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_on_cuda_devices(dtype: torch.dtype, kernels: ModuleType) -> None:
    assert dense_dispatch._serving(on_cuda(dtype)) is kernels


def test_what_triton_does_not_take(kernels: ModuleType) -> None:
    assert dense_dispatch._serving(on_cuda(torch.float64)) is dense_block
    assert dense_dispatch._serving(on_cuda(torch.float32, elements=0)) is dense_block
    assert dense_dispatch._serving(torch.empty(2, 3)) is dense_block


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_dispatch, "_triton", lambda: None)
    assert dense_dispatch._serving(on_cuda(torch.float32)) is dense_block


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_triton_is_not_chosen() -> None:
    assert dense_dispatch._triton() is None
