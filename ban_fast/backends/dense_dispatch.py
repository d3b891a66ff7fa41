"""Which implementation of a dense block serves a tensor: Triton's kernels on a CUDA device, else dense_block.py."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ban_fast.backends import dense_block
from ban_fast.backends.dense_interface import Gradients, Need, Saved
from ban_fast.backends.dense_shape import Norm

__all__ = ["Gradients", "Need", "Saved", "backward", "forward"]


def forward(
    x: Tensor,  # [B, C0, H, W]
    convs: Sequence[Tensor],  # [4k, C, 1, 1], [k, 4k, 3, 3] of every unit; then the exit's [out, C, 1, 1] if it has one
    norms: Sequence[Norm],  # two of every unit, then the exit's
    *,
    group: str,
    keep: bool,
) -> tuple[Tensor, Saved]:
    """See `dense_block.forward`."""
    result: tuple[Tensor, Saved] = _serving(x).forward(x, convs, norms, group=group, keep=keep)
    return result


def backward(
    grad: Tensor,  # as forward's result
    saved: Saved,
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    need: Need,
    *,
    group: str,
) -> Gradients:
    """See `dense_block.backward`."""
    result: Gradients = _serving(saved.features).backward(grad, saved, convs, norms, need, group=group)
    return result


def _serving(x: Tensor) -> ModuleType:
    """Both understand what the other saved. The kernels take no fp64, and no empty batch."""
    kernels = _triton() if x.device.type == "cuda" and x.dtype != torch.float64 and x.numel() else None
    return kernels or dense_block


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from ban_fast.backends import triton
    except ImportError:
        return None
    return importlib.import_module("ban_fast.backends.triton.dense") if triton.problem("cuda") is None else None
