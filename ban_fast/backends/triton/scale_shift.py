"""y = x * scale + shift by channel, and ReLU: what batch norm and the ReLU after it are in eval mode, in one pass.

A number is read once and written once, where the two operations read and write it twice. CUDA tensors, and CPU tensors in
Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.triton.launch import OPTIONS, arithmetic, on

_TILE = 2048
"""Numbers of a program: 16 a thread."""
_MOST_COLUMNS = 512


@triton.jit
def scale_shift_kernel(
    x,  # [rows, columns]
    y,
    scale,  # [channels]
    shift,
    rows: tl.int64,
    columns,
    channels,
    BY_ROW: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile. Row r has channel `r % channels` with BY_ROW, else column c has channel c."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    channel = row % channels if BY_ROW else column
    known = row < rows if BY_ROW else column < columns
    a = tl.load(scale + channel, mask=known, other=0.0).to(ACC)
    b = tl.load(shift + channel, mask=known, other=0.0).to(ACC)
    place = row * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(ACC) * a + b
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool) -> Tensor:  # [B, C, ...], [C], [C] -> as x
    """x * scale + shift along dimension 1, below 0 cut off where `relu`; computed in fp32 (fp64 for fp64), rounded once.

    In x's dtype and memory format; one launch, and a copy before it where x is neither contiguous nor channels_last.
    """
    channels = x.shape[1]
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not is_last:
        x = x.contiguous()
    y = torch.empty_like(x)
    if not x.numel():
        return y
    by_row = x.ndim > 2 and not is_last
    columns = x[0, 0].numel() if by_row else channels
    rows = x.numel() // columns
    width = min(triton.next_power_of_2(columns), _MOST_COLUMNS)
    height = _TILE // width
    with on(x.device):
        scale_shift_kernel[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
            x, y, scale, shift, rows, columns, channels,
            BY_ROW=by_row, RELU=relu, ROWS=height, COLUMNS=width, ACC=arithmetic(x)[1], num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y
