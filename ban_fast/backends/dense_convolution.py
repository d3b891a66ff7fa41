"""Convolutions over channels-last maps, and the views that they and the passes take."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(x: Tensor) -> Tensor:  # [b, H, W, C] -> [b H W, C]
    """A view: one row a pixel."""
    return x.view(x.shape[0] * x.shape[1] * x.shape[2], x.shape[3])


def images_first(x: Tensor) -> Tensor:  # [b, H, W, C] -> [b, C, H, W]
    """A view, channels last in memory."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:  # [b, C, H, W] -> [b, H, W, C], contiguous
    """A view where x is channels last in memory, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def convolve(a: Tensor, weight: Tensor) -> Tensor:  # [b, H, W, C], [out, C, s, s] -> [b, H, W, out]
    """The convolution of contiguous `a`, of stride 1 and padded to the same size."""
    y = F.conv2d(_as_convolved(a, weight), weight, padding=weight.shape[-1] // 2)
    return channels_last(y).view(*a.shape[:3], weight.shape[0])


def convolve_backward(
    grad: Tensor,  # [b, H, W, out], contiguous
    a: Tensor,  # [b, H, W, C], contiguous
    weight: Tensor,  # [out, C, s, s]
    weight_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `a`, and of `weight` if wanted."""
    padding, mask = weight.shape[-1] // 2, [True, weight_wanted, False]
    da, dw, _ = torch.ops.aten.convolution_backward(
        _as_convolved(grad, weight),
        _as_convolved(a, weight),
        weight,
        None,
        [1, 1],
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        mask,
    )
    return channels_last(da).view(a.shape), dw


def _as_convolved(x: Tensor, weight: Tensor) -> Tensor:  # [b, H, W, C] -> [b, C, H, W], or for 1x1 [b H, C, 1, W]
    """A view. On one thread torch leaves 1x1 convolutions of less than 16 images to BLAS, at half oneDNN's speed; for
    those every row of pixels can be an image."""
    if weight.shape[-1] == 1:
        x = x.view(x.shape[0] * x.shape[1], 1, x.shape[2], x.shape[3])
    return x.permute(0, 3, 1, 2)
