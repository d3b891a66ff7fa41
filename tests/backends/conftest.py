import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names Linux's from 3.12 on


@pytest.fixture
def sparse() -> Callable[[int, torch.dtype], Tensor]:
    """So many zeros of a dtype, of which the system provides a page when it is first touched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("asks for memory without pages as Linux has it")

    def zeros(elements: int, dtype: torch.dtype) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype, count=elements)

    return zeros


@pytest.fixture
def far_apart(sparse: Callable[[int, torch.dtype], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """A matrix with more than 2^31 elements of memory between its neighbours in a dimension."""

    def spread(matrix: Tensor, dimension: int) -> Tensor:
        apart = 2**31 + 8
        strides = (apart, 1) if dimension == 0 else (1, apart)
        elements = (matrix.shape[dimension] - 1) * apart + matrix.shape[1 - dimension]
        return sparse(elements, matrix.dtype).as_strided(matrix.shape, strides).copy_(matrix)

    return spread
