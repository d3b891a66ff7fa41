from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mm and baddbmm with out_dtype, which torch has for GPUs alone, on the CPU for the time of a test."""
    library = torch.library.Library("aten", "IMPL")
    called: set[str] = set()

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        called.add("mm")
        assert a.dtype == b.dtype != out_dtype == out.dtype
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def baddbmm(
        summand: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
    ) -> Tensor:
        called.add("baddbmm")
        assert a.dtype == b.dtype != out_dtype == out.dtype == summand.dtype
        return out.copy_(summand + a.to(out_dtype) @ b.to(out_dtype))

    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("baddbmm.dtype_out", baddbmm, "CPU")
    monkeypatch.setattr("ban_fast.ops.linear_kd_chunks.multiplies_halves", lambda device: True)
    yield
    library._destroy()
    assert called == {"mm", "baddbmm"}
