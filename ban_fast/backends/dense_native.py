"""A dense block's passes over memory (dense_passes.py) on the CPU, each in one go over its rows (csrc/dense.h).

Importing it is an ImportError where `ban_fast._native` was not built.
"""

import torch
from torch import Tensor

from .._native import (
    dense_activate,
    dense_correct,
    dense_deposit,
    dense_moments,
    dense_pointwise,
    dense_pointwise_backward,
    instruction_set,
)
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


MOST_WEIGHTS = 1 << 19
"""Of a product. Beside activation, oneDNN's convolution and deposit one by one (two threads of an AMD EPYC with
AVX-512, fp32), backward took 0.75 of the time at 10,000 weights, 0.9 at 380,000, the same at 480,000 and 1.1 at 1.4
million: their gradient no longer stays in the cache from one block of rows to the next."""


def multiplies(dtype: torch.dtype, weights: int) -> bool:
    """Whether the products below take that dtype, and are the faster way: they are written for AVX2 and AVX-512."""
    return dtype in (torch.float32, torch.float64) and weights <= MOST_WEIGHTS and instruction_set() != "baseline"


def pointwise(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor) -> None:
    """As `dense_passes.pointwise`."""
    assert weight.shape == (out.shape[1], x.shape[1]), f"{list(weight.shape)} of {list(x.shape)}"
    scale, shift, weight = scale.contiguous(), shift.contiguous(), weight.contiguous()
    vectors = scale.data_ptr(), shift.data_ptr(), weight.data_ptr()
    dense_pointwise(_size(x), _pixels(x), *vectors, len(weight), _pixels(out), torch.get_num_threads())


def pointwise_backward(
    grad: Tensor,  # [R, out]
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    mean: Tensor,  # [C]
    weight: Tensor,  # [out, C]
    into: Tensor,  # [R, C], any pitch
    sums: Tensor,  # [2, C]
    weight_grad: Tensor | None,  # [out, C], contiguous
    *,
    add: bool,
) -> None:
    """As `dense_passes.pointwise_backward`."""
    scale, shift, mean, weight = scale.contiguous(), shift.contiguous(), mean.contiguous(), weight.contiguous()
    vectors = scale.data_ptr(), shift.data_ptr(), mean.data_ptr(), weight.data_ptr()
    assert weight.shape == (grad.shape[1], x.shape[1]), f"{list(weight.shape)} of {list(x.shape)}"
    assert weight_grad is None or (weight_grad.is_contiguous() and weight_grad.shape == weight.shape)
    dense_pointwise_backward(
        _size(x),
        _pixels(grad),
        _pixels(x),
        *vectors,
        len(weight),
        _pixels(into),
        *_two(sums),
        0 if weight_grad is None else weight_grad.data_ptr(),
        add,
        torch.get_num_threads(),
    )


def _size(x: Tensor) -> tuple[int, int, int]:
    return DTYPE[x.dtype], *x.shape


def _pixels(x: Tensor) -> tuple[int, int]:
    assert x.stride(1) == 1 or x.shape[1] < 2, f"strides {x.stride()}: channels must be neighbours"
    return x.data_ptr(), x.stride(0)


def _two(vectors: Tensor) -> tuple[int, int]:  # [2, C]
    assert vectors.stride(1) == 1 or vectors.shape[1] < 2, f"strides {vectors.stride()}"
    first = vectors.data_ptr()
    return first, first + vectors.stride(0) * vectors.element_size()
