"""A dense block's passes over memory (dense_passes.py) on the CPU, each in one go over its rows (csrc/dense.h).

Importing it is an ImportError where `ban_fast._native` was not built.
"""

import torch
from torch import Tensor

from .._native import dense_activate, dense_correct, dense_deposit, dense_moments
from .addresses import DTYPE


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:  # [R, C], [C], [C], [R, C]
    """As `dense_passes.activate`."""
    scale, shift = scale.contiguous(), shift.contiguous()
    dense_activate(_size(x), _pixels(x), scale.data_ptr(), shift.data_ptr(), _pixels(out), torch.get_num_threads())


def moments(x: Tensor, out: Tensor) -> None:  # [R, C], [2, C]
    """As `dense_passes.moments`."""
    dense_moments(_size(x), _pixels(x), *_two(out), torch.get_num_threads())


def deposit(
    grad: Tensor,  # [R, C] in x's dtype
    activation: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C]
    mean: Tensor,  # [C]
    into: Tensor,  # [R, C] acc
    sums: Tensor,  # [2, C]
    *,
    add: bool,
) -> None:
    """As `dense_passes.deposit`; what it may overwrite stays as it is."""
    scale, mean = scale.contiguous(), mean.contiguous()
    pixels = _pixels(grad), _pixels(activation), _pixels(x)
    vectors = scale.data_ptr(), mean.data_ptr()
    dense_deposit(_size(x), *pixels, *vectors, _pixels(into), *_two(sums), add, torch.get_num_threads())


def correct(grad: Tensor, x: Tensor, mean: Tensor, p: Tensor, q: Tensor, out: Tensor) -> None:
    """As `dense_passes.correct`."""
    mean, p, q = mean.contiguous(), p.contiguous(), q.contiguous()
    vectors = mean.data_ptr(), p.data_ptr(), q.data_ptr()
    dense_correct(_size(x), _pixels(grad), _pixels(x), *vectors, _pixels(out), torch.get_num_threads())


def _size(x: Tensor) -> tuple[int, int, int]:
    return DTYPE[x.dtype], *x.shape


def _pixels(x: Tensor) -> tuple[int, int]:
    assert x.stride(1) == 1 or x.shape[1] < 2, f"strides {x.stride()}: channels must be neighbours"
    return x.data_ptr(), x.stride(0)


def _two(vectors: Tensor) -> tuple[int, int]:  # [2, C]
    assert vectors.stride(1) == 1 or vectors.shape[1] < 2, f"strides {vectors.stride()}"
    first = vectors.data_ptr()
    return first, first + vectors.stride(0) * vectors.element_size()
