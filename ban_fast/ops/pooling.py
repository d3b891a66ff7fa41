"""Average pooling that keeps nothing for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def halved(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H // 2, W // 2]
    """`F.avg_pool2d(x, 2)`. Its gradient is made of a shape alone, where autograd's own keeps x."""
    y: Tensor = _Halved.apply(x)
    return y


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.odd = x.shape[2] % 2, x.shape[3] % 2
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        down, right = ctx.odd
        grad = F.interpolate(grads[0] / 4, scale_factor=2)
        return F.pad(grad, (0, right, 0, down)) if down or right else grad
