"""A dense block and its exit as one operator: units, then BN-ReLU and a 1x1 convolution, or the mean over the image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ban_fast.backends import dense_dispatch as backend
from ban_fast.backends.dense_shape import Norm, Shape
from ban_fast.backends.interface import acc_dtype
from ban_fast.ops.autocast import autocast_dtype
from ban_fast.ops.autograd import is_traced, refuse_forward_mode

__all__ = ["Norm", "Statistics", "dense_block"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NORMS = "Tensor[] weights, Tensor[] biases, Tensor?[] means, Tensor?[] variances, float[] eps"
_SAVED = "Tensor features, Tensor[] hidden, Tensor statistics, Tensor hidden_statistics, Tensor total"

torch.library.define(
    "ban_fast::dense_block",
    f"(Tensor x, Tensor[] convs, {_NORMS}, *, str group, bool keep) -> (Tensor y, {_SAVED})",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ban_fast::dense_block_backward",
    f"(Tensor grad, {_SAVED}, Tensor[] convs, {_NORMS}, bool need_x, bool[] need_convs, bool[] need_norms, *, "
    "str group) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)

Packed = tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]


class Statistics(NamedTuple):
    """The batch's, biased variances: to update running statistics by. Zeros where no norm normalises by them."""

    features: Tensor
    """[2, C] acc: mean and variance of all that the exit reads; a unit's first norm has the first ones."""
    hidden: Tensor
    """[n, 2, 4k] acc: those of every unit's second norm."""
    total: Tensor
    """[] acc: the values that each is over, on all ranks that share them."""


def dense_block(
    x: Tensor,  # [B, C0, H, W]
    convs: Sequence[Tensor],  # [4k, C, 1, 1], [k, 4k, 3, 3] of every unit; then the exit's [out, C, 1, 1] if it has one
    norms: Sequence[Norm],  # two of every unit, then the exit's
    *,
    group: str = "",
) -> tuple[Tensor, Statistics]:
    """The units of a dense block, then its exit, with every feature stored once and no normalised one.

    Unit j reads the C = C0 + j k channels before its own: 1x1 convolution of relu(norm), then 3x3 of relu(norm), which
    makes k more. The exit is relu(norm) of all channels, convolved to [B, out, H, W], or averaged to [B, C] where
    `convs` has no weight for it. A norm whose `mean` is None normalises by the batch, over the ranks of the process
    group that `group` names if it names one. Under autocast all is stored in its dtype; statistics, and sums of
    gradients, are fp32 at least.

    Running statistics are the caller's to update. ValueError for a dtype that is not fp32, fp64, bf16 or fp16; a second
    derivative (create_graph), one in forward mode, and torch.jit.trace are RuntimeErrors.
    """
    for tensor in (x, *convs):
        refuse_forward_mode(tensor, "a dense block")
    if torch._C._get_tracing_state() is not None:  # it would record this call's addresses
        raise RuntimeError("a dense block can't be traced by torch.jit: use torch.export or torch.compile")
    dtype = x.dtype
    if dtype not in DTYPES:
        raise ValueError(f"x: a dense block takes float32, float64, bfloat16 or float16, got {dtype}")
    if dtype != torch.float64:
        dtype = autocast_dtype(x.device.type) or dtype
    acc = acc_dtype(dtype)
    x, convs = x.to(dtype), [weight.to(dtype) for weight in convs]
    norms = [norm.to(acc) for norm in norms]
    tensors = (x, *convs, *(tensor for norm in norms for tensor in (norm.weight, norm.bias)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        weights, biases, means, variances, eps = _columns(norms)
        options = group, len(convs), tuple(eps)
        y, *statistics = _Block.apply(options, x, *convs, *weights, *biases, *means, *variances)
    else:
        y, saved = _forward(x, convs, norms, group, keep=False)
        statistics = [saved.statistics, saved.hidden_statistics, saved.total]
    return y, Statistics(*statistics)


Options = tuple[str, int, tuple[float, ...]]
"""The process group's name, how many convolutions there are, and every norm's eps."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        group = options[0]
        y, saved = _forward(x, *_unpack(options, tensors), group, keep=True)
        statistics = saved.statistics, saved.hidden_statistics, saved.total
        ctx.save_for_backward(saved.features, *statistics, *tensors, *saved.hidden)
        ctx.options, ctx.count = options, len(tensors)
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled backwards refuse on their own
            raise RuntimeError(
                'memory="shared" has no second derivative: call backward without create_graph=True, or use "checkpoint"'
            )
        features, statistics, hidden_statistics, total, *tensors = ctx.saved_tensors
        convs, norms = _unpack(ctx.options, tensors[: ctx.count])
        saved = backend.Saved(features, tensors[ctx.count :], statistics, hidden_statistics, total)
        need_x, *needed = ctx.needs_input_grad[1:]
        weights, biases = needed[len(convs) :][: len(norms)], needed[len(convs) + len(norms) :][: len(norms)]
        either = [weight or bias for weight, bias in zip(weights, biases, strict=True)]
        need = backend.Need(need_x, needed[: len(convs)], either)
        result = _backward(grads[0], saved, convs, norms, need, ctx.options[0])
        grad_weights, grad_biases = ([None if g is None else g[i] for g in result.norms] for i in range(2))
        return None, result.x, *result.convs, *grad_weights, *grad_biases, *([None] * (2 * len(norms)))


def _unpack(options: Options, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Norm]]:
    """Convolutions and norms of `_Block.apply`: convolutions, weights, biases, means, variances."""
    _, count, eps = options
    n = len(eps)
    columns = [tensors[count + i * n :][:n] for i in range(4)]
    return tensors[:count], [Norm(*norm) for norm in zip(*columns, eps, strict=True)]


def _columns(norms: Sequence[Norm]) -> tuple[list[Any], ...]:
    """Weights, biases, means, variances and eps of the norms: the operators' arguments."""
    return tuple(list(column) for column in zip(*norms, strict=True))


def _forward(
    x: Tensor, convs: Sequence[Tensor], norms: Sequence[Norm], group: str, *, keep: bool
) -> tuple[Tensor, backend.Saved]:
    if is_traced(x) or x.is_meta:
        y, *saved = torch.ops.ban_fast.dense_block(x, convs, *_columns(norms), group=group, keep=keep)
        return y, backend.Saved(*saved)
    with torch.autocast(x.device.type, enabled=False):
        return backend.forward(x, convs, norms, group=group, keep=keep)


def _backward(
    grad: Tensor,
    saved: backend.Saved,
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    need: backend.Need,
    group: str,
) -> backend.Gradients:
    if not (is_traced(grad) or grad.is_meta):
        with torch.autocast(grad.device.type, enabled=False):
            return backend.backward(grad, saved, convs, norms, need, group=group)
    found = iter(torch.ops.ban_fast.dense_block_backward(grad, *saved, convs, *_columns(norms), *need, group=group))
    x = next(found) if need.x else None
    conv_grads = [next(found) if wanted else None for wanted in need.convs]
    return backend.Gradients(x, conv_grads, [next(found) if wanted else None for wanted in need.norms])


@torch.library.impl("ban_fast::dense_block", "default")
def _operator(x: Tensor, convs: list[Tensor], *columns: list[Any], group: str, keep: bool) -> Packed:
    norms = [Norm(*norm) for norm in zip(*columns, strict=True)]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y, saved = backend.forward(x, convs, norms, group=group, keep=keep)
    return y, *saved


def _fake(x: Tensor, convs: list[Tensor], weights: list[Tensor], *columns: list[Any], group: str, keep: bool) -> Packed:
    norms = [Norm(weight, weight, None, None, 0.0) for weight in weights]
    shape = Shape.of(x, convs, norms)
    exits = len(convs) > 2 * shape.units
    y = shape.maps(convs[-1].shape[0]).permute(0, 3, 1, 2) if exits else shape.new(shape.batch, shape.channels)
    hidden = [shape.maps(shape.bottleneck) for _ in range(shape.units - shape.remade if keep else 0)]
    hidden_statistics = shape.vectors(shape.units, 2, shape.bottleneck)
    return y, shape.features(), hidden, shape.vectors(2, shape.channels), hidden_statistics, shape.vectors()


torch.library.register_fake("ban_fast::dense_block", _fake)


@torch.library.impl("ban_fast::dense_block_backward", "default")
def _backward_operator(
    grad: Tensor,
    features: Tensor,
    hidden: list[Tensor],
    statistics: Tensor,
    hidden_statistics: Tensor,
    total: Tensor,
    convs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    means: list[Tensor | None],
    variances: list[Tensor | None],
    eps: list[float],
    need_x: bool,
    need_convs: list[bool],
    need_norms: list[bool],
    *,
    group: str,
) -> list[Tensor]:
    norms = [Norm(*norm) for norm in zip(weights, biases, means, variances, eps, strict=True)]
    saved = backend.Saved(features, hidden, statistics, hidden_statistics, total)
    need = backend.Need(need_x, need_convs, need_norms)
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        result = backend.backward(grad, saved, convs, norms, need, group=group)
    return [g for g in (result.x, *result.convs, *result.norms) if g is not None]


def _backward_fake(
    grad: Tensor,
    features: Tensor,
    hidden: list[Tensor],
    statistics: Tensor,
    hidden_statistics: Tensor,
    total: Tensor,
    convs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    means: list[Tensor | None],
    variances: list[Tensor | None],
    eps: list[float],
    need_x: bool,
    need_convs: list[bool],
    need_norms: list[bool],
    *,
    group: str,
) -> list[Tensor]:
    entry = weights[0].shape[0]
    x = [features.new_empty((*features.shape[:3], entry)).permute(0, 3, 1, 2)] if need_x else []
    conv_grads = [torch.empty_like(weight) for weight, wanted in zip(convs, need_convs, strict=True) if wanted]
    norm_grads = [w.new_empty((2, w.shape[0])) for w, wanted in zip(weights, need_norms, strict=True) if wanted]
    return [*x, *conv_grads, *norm_grads]


torch.library.register_fake("ban_fast::dense_block_backward", _backward_fake)
