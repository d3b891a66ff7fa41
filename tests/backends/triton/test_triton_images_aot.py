"""The kernel of images compiles for sm_80 and sm_90 as it is launched, without a GPU, and spills nothing."""

import itertools

import pytest
import torch
import triton_aot

from ban_fast.backends.triton import images
from ban_fast.data.augment import Augmentation, sources

SHAPES = [(32, 32, 3), (28, 28, 1), (224, 224, 3), (64, 64, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def show(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    offset: int = 0,
) -> None:
    """Launches it for a batch that begins `offset` images into an epoch."""
    tables = [table.to(torch.int32).contiguous() for table in sources(Augmentation(), shape)]
    index = torch.zeros(40, dtype=torch.int64)[offset : offset + 32]
    stored = torch.empty(2, *shape, dtype=torch.uint8)
    images.show(stored, *tables, index, index, torch.empty(shape[-1], 256, dtype=dtype), memory_format)


@pytest.mark.parametrize("capability", [80, 90])
def test_it_does_not_spill(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program's registers hang on the channels, the word's size and the strides.
    for shape, dtype, memory_format in itertools.chain(
        zip(SHAPES, DTYPES, itertools.cycle(FORMATS), strict=False),
        ((SHAPES[0], dtype, memory_format) for dtype in DTYPES[:2] for memory_format in FORMATS),
    ):
        with triton_aot.compiling(capability, monkeypatch) as kernels:
            show(shape, dtype, memory_format)
        (kernel,) = kernels  # one launch
        registers, spilled = kernel.resources()
        print(f"sm_{capability} {shape} {dtype} {memory_format}: {registers} registers, {kernel.shared} bytes shared")
        assert spilled == 0
        assert kernel.shared <= 8192  # what changes hands between threads that read and threads that write
        assert registers <= 64  # 32 warps a multiprocessor: enough under way to hide what the tables wait for
        assert kernel.grid[0] == 32


def test_stores_are_as_wide_as_the_layout_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a thread where a channel's pixels are neighbours."""
    with triton_aot.compiling(90, monkeypatch) as kernels:
        show((32, 32, 3))
    assert "st.global.v4.b32" in kernels[0].ptx


def test_a_batch_elsewhere_in_the_epoch_is_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured call can't wait for a compiler."""
    with triton_aot.compiling(90, monkeypatch) as kernels:
        for offset in range(4):
            show((32, 32, 3), offset=offset)
    assert len({triton_aot.specialisation(kernel) for kernel in kernels}) == 1
