"""Scale, shift and ReLU compile for sm_80 and sm_90 as they are launched, without a GPU, and spill nothing."""

import pytest
import torch
import triton_aot

from ban_fast.backends.triton.scale_shift import scale_shift

SHAPES = [(8, 160, 32, 32), (8, 33, 32, 32), (8, 640, 8, 8), (8, 100)]


@pytest.mark.parametrize("capability", [80, 90])
def test_it_does_not_spill(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            x, factors = torch.empty(shape, dtype=dtype), torch.empty(shape[1], dtype=acc)
            for each in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x):
                with triton_aot.compiling(capability, monkeypatch) as kernels:
                    scale_shift(each, factors, factors, relu=True)
                (kernel,) = kernels
                registers, spilled = kernel.resources()
                assert spilled == 0
                assert registers <= 128  # 16 warps a multiprocessor
                if dtype == torch.float32 and shape[1] % 16 == 0:  # wide loads and stores, in either format
                    assert "ld.global.v4" in kernel.ptx
                    assert "st.global.v4" in kernel.ptx
