"""Average pooling that keeps nothing, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast.ops.pooling import halved


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


# Odd sizes lose a row or a column, which gets no gradient.
@pytest.mark.parametrize("size", [(8, 8), (7, 6), (6, 7), (5, 3), (2, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_as_torch_does(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = images(2, 3, *size, dtype=dtype)
    expected = F.avg_pool2d(x, 2) if min(size) > 1 else None
    if expected is None:
        with pytest.raises(RuntimeError, match="Output size is too small"):
            halved(x)
        return
    y = halved(x)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(each, x, grad)[0] for each in (y, expected)))  # a quarter is exact


def test_layout_stays() -> None:
    x = images(2, 3, 8, 8)
    y = halved(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for tensor in (y, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_kept() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        assert halved(images(2, 3, 8, 8)).requires_grad
    assert not kept


def test_second_derivatives_and_compile() -> None:
    x = images(1, 2, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(halved, (x,))
    y = torch.compile(halved, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, halved(x))
    assert torch.equal(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (y, halved(x))))
