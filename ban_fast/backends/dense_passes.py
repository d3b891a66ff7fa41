"""The passes over memory that a dense block is made of, beside its convolutions, and two that have one within.

Rows are pixels: x is [R, C] with any pitch, so the first channels of a wider channels-last buffer cost no copy.
"acc" is fp64 for fp64 features and fp32 for all others; vectors over channels are acc. Nothing syncs a GPU's host.

On a CPU they are native code where that was built, and eager torch elsewhere: equal to rounding. `pointwise` and its
backward are there where `multiplies` says so.
"""

import functools
import importlib
from types import ModuleType

from torch import Tensor

from ban_fast.backends import dense_eager


def activate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:  # [R, C], [C], [C], [R, C]
    """out = relu(x * scale + shift) in acc, rounded once: batch norm and ReLU."""
    _passes(x).activate(x, scale, shift, out)


def moments(x: Tensor, out: Tensor) -> None:  # [R, C], [2, C]
    """out = mean over rows, and sum of squared distances from it: of values near the mean, so that nothing cancels."""
    _passes(x).moments(x, out)


def deposit(
    grad: Tensor,  # [R, C] in x's dtype: d loss / d activation; may be overwritten
    activation: Tensor,  # [R, C]: what `activate` makes of x; may be overwritten
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C]
    mean: Tensor,  # [C]
    into: Tensor,  # [R, C] acc, any pitch
    sums: Tensor,  # [2, C]
    *,
    add: bool,
) -> None:
    """With dz = grad where ReLU let x through: into = dz * scale, or += it; sums += (sum dz, sum dz * (x - mean))."""
    _passes(x).deposit(grad, activation, x, scale, mean, into, sums, add=add)


def correct(grad: Tensor, x: Tensor, mean: Tensor, p: Tensor, q: Tensor, out: Tensor) -> None:
    """out = grad - p - (x - mean) * q, all [R, C] or [C]: what every batch norm of x takes from its gradient."""
    _passes(x).correct(grad, x, mean, p, q, out)


def multiplies(x: Tensor, weights: int) -> bool:
    """Whether `pointwise` and `pointwise_backward` of so many weights take x: on a CPU with native code, in fp32 and
    fp64, as long as they are the faster way."""
    native = _native() if x.device.type == "cpu" else None
    return native is not None and native.multiplies(x.dtype, weights)


def pointwise(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = relu(x * scale + shift) weight^T, [R, out]: the 1x1 convolution of what `activate` would make of x."""
    _passes(x).pointwise(x, scale, shift, weight, out)


def pointwise_backward(
    grad: Tensor,  # [R, out]: d loss / d out of `pointwise`
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    mean: Tensor,  # [C]
    weight: Tensor,  # [out, C]
    into: Tensor,  # [R, C], any pitch
    sums: Tensor,  # [2, C]
    weight_grad: Tensor | None,  # [out, C], contiguous; None where nobody asks
    *,
    add: bool,
) -> None:
    """What `deposit` does with the gradient of what `activate` makes of x; and weight_grad += the weight's."""
    _passes(x).pointwise_backward(grad, x, scale, shift, mean, weight, into, sums, weight_grad, add=add)


def _passes(x: Tensor) -> ModuleType:
    native = _native() if x.device.type == "cpu" else None
    return native or dense_eager


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module("ban_fast.backends.dense_native")
    except ImportError:
        return None
