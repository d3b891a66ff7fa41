"""Scale, shift and ReLU in one pass are batch norm in eval mode and the ReLU after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ban_fast.backends.triton.scale_shift import scale_shift
from ban_fast.models.folding import ScaleShift

SHAPES = [(3, 5, 7, 6), (2, 64, 8, 8), (2, 3, 40, 40), (4, 600, 2, 3), (5, 10), (2, 3, 1, 1), (2, 4, 9)]
"""Odd sizes; whole tiles; an image longer than a tile's row, channels that are, no image at all, and one dimension."""


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, scale, shift = (torch.randn(size, generator=generator).to(device) for size in (shape, shape[1], shape[1]))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), scale.to(acc), shift.to(acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale, shift = values(shape, dtype, device)
    view = (1, -1, *[1] * (len(shape) - 2))
    truth = x.double() * scale.double().view(view) + shift.double().view(view)
    # A product and a sum, each rounded or both at once, then the result's own dtype; of numbers up to 16.
    limit = 16 * {torch.float32: 2**-23, torch.float64: 2**-52, torch.float16: 2**-11}[dtype]
    for way in (torch.Tensor.contiguous, channels_last):
        for relu in (False, True):
            y = scale_shift(way(x), scale, shift, relu=relu)
            assert y.dtype == dtype
            assert y.stride() == way(x).stride()
            assert (y.double() - (truth.clamp(min=0) if relu else truth)).abs().max() <= limit


def test_strides_that_are_neither(device: torch.device) -> None:
    x, scale, shift = values((4, 6, 8, 8), torch.float32, device)
    y = scale_shift(x[:, :, ::2, 1::2], scale, shift, relu=True)
    assert torch.equal(y, scale_shift(x[:, :, ::2, 1::2].contiguous(), scale, shift, relu=True))


def test_what_is_not_a_number_stays_so(device: torch.device) -> None:
    """As in torch's ReLU: a teacher gone wrong must be seen."""
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -1.0]], device=device)
    y = scale_shift(x, torch.ones(4, device=device), torch.zeros(4, device=device), relu=True)
    assert y[0, 0].isnan()
    assert y[0, 1:].tolist() == [float("inf"), 0.0, 0.0]


def test_an_empty_batch(device: torch.device) -> None:
    x = torch.empty(0, 3, 4, 4, device=device)
    assert scale_shift(x, torch.ones(3, device=device), torch.ones(3, device=device), relu=True).shape == x.shape


@torch.no_grad()
def test_it_is_the_batch_norm(device: torch.device) -> None:
    """A norm's numbers as `ScaleShift` keeps them, through the kernel and through torch."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(16).to(device).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        assert tensor is not None
        tensor.copy_(torch.randn(16, generator=generator))
    x = torch.randn(4, 16, 9, 9, generator=generator).to(device)
    folded = ScaleShift(norm, relu=True)
    y = scale_shift(x, folded.get_buffer("scale"), folded.get_buffer("shift"), relu=True)
    torch.testing.assert_close(y, F.relu(norm(x)), rtol=1e-5, atol=1e-5)
