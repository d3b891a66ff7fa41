"""A dense block's passes over memory (dense_passes.py) in eager torch: on any device, and the reference of others."""

import torch
from torch import Tensor


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:  # [R, C], [C], [C], [R, C]
    """out = relu(x * scale + shift) in acc, rounded once: batch norm and ReLU."""
    if x.dtype == scale.dtype:
        torch.addcmul(shift, x, scale, out=out).relu_()
    else:
        out.copy_(torch.addcmul(shift, x.to(scale.dtype), scale).relu_())


def moments(x: Tensor, out: Tensor) -> None:  # [R, C], [2, C]
    """out = mean over rows, and sum of squared distances from it: taken from the mean, so that nothing cancels."""
    acc = x.to(out.dtype)
    torch.mean(acc, 0, out=out[0])
    torch.sum((acc - out[0]).square_(), 0, out=out[1])


def deposit(
    grad: Tensor,  # [R, C] in x's dtype: d loss / d activation; overwritten
    activation: Tensor,  # [R, C]: what `activate` makes of x; overwritten
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C]
    mean: Tensor,  # [C]
    into: Tensor,  # [R, C] acc, any pitch
    sums: Tensor,  # [2, C]
    *,
    add: bool,
) -> None:
    """With dz = grad where ReLU let x through: into = dz * scale, or += it; sums += (sum dz, sum dz * (x - mean))."""
    torch.ops.aten.threshold_backward.grad_input(grad, activation, 0, grad_input=grad)
    dz = grad.to(scale.dtype)
    distance = torch.sub(x, mean, out=activation) if x.dtype == mean.dtype else x - mean
    sums[0] += dz.sum(0)
    sums[1] += distance.mul_(dz).sum(0)
    if add:
        into.addcmul_(dz, scale)
    else:
        torch.mul(dz, scale, out=into)


def correct(grad: Tensor, x: Tensor, mean: Tensor, p: Tensor, q: Tensor, out: Tensor) -> None:
    """out = grad - p - (x - mean) * q, all [R, C] or [C]: what every batch norm of x takes from its gradient."""
    distance = torch.sub(x, mean, out=out) if x.dtype == mean.dtype else x - mean
    out.copy_(torch.addcmul(grad, distance, q, value=-1, out=distance).sub_(p))
