"""The backward kernel: the stored gradient times grad_output, which only the device knows. Kernel and launch."""

import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.triton import config, launch

_BLOCK = 4096
_PROGRAMS_PER_MULTIPROCESSOR = 8
"""Programs of 8 warps: where grad_output is 1 they load it and return, so that there are no more than fit at once."""


@triton.jit(**config.JIT)
def scale_kernel(
    grad,  # [R * C]
    grad_output,  # 0-d, or [R] with BY_ROW
    grad_scale,  # 0-d or None
    num_rows: tl.int32,
    row_length: tl.int64,  # C, or without BY_ROW all there is (and then num_rows is 1)
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    """In place, with one rounding; not even read where the product is 1."""
    row_length = (row_length // ALIGN) * ALIGN
    blocks = tl.cdiv(row_length, BLOCK)
    for job in range(tl.program_id(0).to(tl.int64), num_rows * blocks, tl.num_programs(0)):
        row = job // blocks
        factor = tl.load(grad_output + (row if BY_ROW else 0)).to(ACC)
        if grad_scale is not None:
            factor *= tl.load(grad_scale).to(ACC)
        if factor != 1.0:
            offsets = (job % blocks) * BLOCK + tl.arange(0, BLOCK)
            pointers = grad + row * row_length + offsets
            value = tl.load(pointers, mask=offsets < row_length).to(ACC) * factor
            tl.store(pointers, value.to(grad.dtype.element_ty), mask=offsets < row_length)


def scale(grad: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    """See `interface.Backend.scale_grad_`. One launch."""
    if grad.numel() == 0:
        return grad
    by_row = grad_output.dim() == 1
    num_rows, row_length = (grad.shape[0], grad.shape[1]) if by_row else (1, grad.numel())
    block = min(_BLOCK, max(128, triton.next_power_of_2(row_length)))
    jobs = num_rows * -(-row_length // block)
    programs = min(jobs, _PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(grad.device))
    with launch.on(grad.device):
        scale_kernel[(programs,)](
            grad=grad,
            grad_output=launch.dense(grad_output),
            grad_scale=grad_scale,
            num_rows=num_rows,
            row_length=row_length,
            BY_ROW=by_row,
            BLOCK=block,
            ALIGN=launch.alignment(row_length),
            ACC=launch.arithmetic(grad)[1],
            num_warps=8 if block == _BLOCK else 4,
            **launch.OPTIONS,
        )
    return grad
