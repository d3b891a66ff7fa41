"""Products of some rows by a whole vocabulary: the three of an output layer, forward and back, a chunk at a time.

Each is summed and stored in the dtype asked for. On a CPU with AVX-512 those in fp32 are oneDNN's, which torch has for
what it compiles (`mkldnn::_linear_pointwise`); torch.mm is MKL's, which keeps to AVX2 on processors of other makers
than its own. One core of an EPYC (Zen 5), [128, 650] x 10,000: 205 GFLOP/s forward, 205 and 180 back, MKL's 101.
"""

from functools import cache

import torch
from torch import Tensor

PIECE = 1000
"""Classes of a weight's gradient that are computed, then added, at a time: with [1000, 650] they are in the cache yet,
and nothing of the whole gradient's size is held beside it. [1120, 650] x 10,000 takes 3 % longer with 500."""


def times_transposed(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:  # [n, H], [V, H]
    """a @ b^T + bias, [n, V], new."""
    if _by_onednn(a):
        return _onednn(a, b, bias)
    product = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    times(product, a, b.t())
    return product if bias is None else product.add_(bias)


def times(out: Tensor, a: Tensor, b: Tensor) -> None:  # [n, m], [n, k], [k, m]
    """out = a @ b."""
    if _by_onednn(a):
        out.copy_(_onednn(a, b.t(), None))
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def transposed_times(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:  # [V, H], [n, V], [n, H]
    """out = a^T @ b, or with `add` what it was and that."""
    if _by_onednn(a):
        columns = b.t().contiguous()
        for first in range(0, len(out), PIECE):
            piece = slice(first, first + PIECE)
            put = out[piece].add_ if add else out[piece].copy_
            put(_onednn(a[:, piece].t(), columns, None))
    elif not add:
        times(out, a.t(), b)
    elif a.dtype == out.dtype:
        out.addmm_(a.t(), b)
    else:  # addmm with out_dtype refused an fp32 summand in its first versions; baddbmm never did
        torch.baddbmm(out[None], a.t()[None], b[None], out_dtype=out.dtype, out=out[None])


def dense(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where its rows or columns do not lie side by side, for which oneDNN takes minutes."""
    is_dense = matrix.is_contiguous() or matrix.t().is_contiguous()
    return matrix if is_dense or not _by_onednn(matrix) else matrix.contiguous()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # [n, k], [m, k], [m]
    """a @ b^T + bias."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


def _by_onednn(a: Tensor) -> bool:
    is_on = bool(torch.backends.mkldnn.enabled)  # by its user, at any time
    return a.dtype == torch.float32 and a.device.type == "cpu" and is_on and _has_onednn()


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
