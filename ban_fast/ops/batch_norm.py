"""Batch norm by the statistics of all ranks' images: on any device, with one exchange forward and one backward."""

from typing import Any

import torch
from torch import Tensor

from ban_fast.backends.dense_statistics import finish, sum_over_ranks
from ban_fast.backends.interface import acc_dtype

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,  # [B, C, ...]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    *,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x normalised by mean and biased variance of every channel over the ranks of the process group named `group`.

    Returns it in x's dtype, then statistics [2, C] (mean, variance) and the count of values that each is over, [],
    both fp32 at least and without a gradient: running statistics are the caller's to update. All ranks must call it;
    one may have no image. A rank's gradients of weight and bias are of its own images.
    """
    return _BatchNorm.apply(x, weight, bias, eps, group)  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        acc = acc_dtype(x.dtype)
        wide, count = x.to(acc), x[:, :1].numel()
        parts = wide.new_zeros(1, 2, x.shape[1])
        if count:
            variance, mean = torch.var_mean(wide, _but_channels(x), correction=0)
            parts[0, 0], parts[0, 1] = mean, variance * count
        statistics = wide.new_empty(2, x.shape[1])
        total = finish(parts, [count], group, statistics)
        mean, scale = statistics[0], (statistics[1] + eps).rsqrt()
        y = (wide - _of_channels(mean, x)) * _of_channels(scale if weight is None else scale * weight.to(acc), x)
        if bias is not None:
            y = y + _of_channels(bias.to(acc), x)
        ctx.save_for_backward(x, weight, bias, mean, scale, total)
        ctx.group = group
        ctx.mark_non_differentiable(statistics, total)
        return y.to(x.dtype), statistics, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale, total = ctx.saved_tensors
        acc = acc_dtype(x.dtype)
        grad, normal = grads[0].to(acc), (x.to(acc) - _of_channels(mean, x)) * _of_channels(scale, x)
        sums = torch.stack((grad.sum(_but_channels(x)), (grad * normal).sum(_but_channels(x))))
        own = sums
        grad_x = None
        if ctx.needs_input_grad[0]:
            by_mean, by_scale = sum_over_ranks(sums, ctx.group) / total
            grad_x = grad - _of_channels(by_mean, x) - normal * _of_channels(by_scale, x)
            grad_x = (grad_x * _of_channels(scale if weight is None else scale * weight.to(acc), x)).to(x.dtype)
        grad_weight = None if weight is None else own[1].to(weight.dtype)
        grad_bias = None if bias is None else own[0].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _of_channels(values: Tensor, x: Tensor) -> Tensor:  # [C] -> [C, 1, ...]
    return values.view(-1, *[1] * (x.ndim - 2))
