"""An output layer whose logits are not rounded to half precision, whatever its operands are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast.ops import products
from ban_fast.ops.autocast import autocast_dtype
from ban_fast.ops.autograd import is_traced
from ban_fast.ops.linear_kd_chunks import layer


def wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [..., H], [V, H], [V] -> [..., V]
    """`F.linear(hidden, weight, bias)`, but that under autocast its result is fp32, as are its sums.

    Operands are rounded as autocast rounds them. A logit that is rounded to bf16 is off by up to 0.4 %, which is what a
    student that is close to its teacher differs by. There is no second derivative under autocast: a RuntimeError.
    """
    kind = hidden.device.type
    autocast = autocast_dtype(kind)
    if autocast is None or hidden.dtype == torch.float64:
        return F.linear(hidden, weight, bias)
    with torch.autocast(kind, enabled=False):
        if is_traced(hidden, (weight, bias)):
            rounded = (tensor.to(autocast).float() for tensor in (hidden, weight, bias))
            return F.linear(*rounded)
        rows: Tensor = _Wide.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, autocast)
    return rows.view(*hidden.shape[:-1], len(weight))


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, autocast: torch.dtype) -> Tensor:  # [R, H]
        ctx.save_for_backward(hidden, weight)
        ctx.autocast = autocast
        made = layer(weight, bias, hidden, autocast)
        return made.logits(made.operand(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an output layer under autocast has no second derivative: call backward without create_graph=True"
            )
        hidden, weight = ctx.saved_tensors
        made, grad = layer(weight, None, hidden, ctx.autocast), grads[0].contiguous()
        operand = made.operand(hidden)
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        of_hidden, of_weight = (
            grad.new_empty(tensor.shape) if need else None
            for tensor, need in ((hidden, need_hidden), (weight, need_weight))
        )
        of_bias = grad.sum(0) if need_bias else None
        factor = grad.to(made.weight.dtype)
        if of_hidden is not None:
            products.times(of_hidden, factor, made.weight)
        if of_weight is not None:
            products.transposed_times(of_weight, factor, operand, add=False)
        return of_hidden, of_weight, of_bias, None
