"""KD and DKPP for rows that need log-sum-exp, and the storing of a gradient that all rows have in common.

Such rows are rare, and are read again, three times and from the cache: held in registers beside what the others need, they
would take those from every row.
"""

import triton
import triton.language as tl

from ban_fast.backends.triton.row_math import exp, far_terms
from ban_fast.backends.triton.rows import load_logits, max_and_sum


@triton.jit
def store_gradient(
    grad_row, cols, apart, z, y, sound, mask, label_part,
    WITH_KD: tl.constexpr, WITH_LABEL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`apart`, the KD term's gradient, plus the label term's, at cols of the rows; 0 in rows that are not sound.

    label_part: the student's maximum, the sum of exp(z - maximum) over the other classes, the gradient's scale.
    """
    z_max, rest, scale = label_part
    value = tl.zeros_like(z)
    if WITH_KD:
        value += apart
    if WITH_LABEL:
        value += tl.where(cols == y, -rest, exp(z - z_max, ACC)) * scale
    value = tl.where(sound, value, 0.0).to(grad_row.dtype.element_ty)
    tl.store(grad_row + cols, value, mask=mask)


@triton.jit
def far_rows(
    z_row, t_row, grad_row, cols, sources, far, y, student_col, teacher_col, num_classes, t_max, t_sum, heat, slope,
    label_part,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr, WITH_KD: tl.constexpr,
    WITH_LABEL: tl.constexpr, T_KIND: tl.constexpr,
):  # fmt: skip
    """[ROWS, 1] KL of the rows where `far` [ROWS, 1] holds, whose gradient is stored; slope * (q - p) for the KD term.

    cols are the classes of the first block's lanes, sources those whose teacher value they take.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    z_max, z_sum = max_and_sum(z_row, far, student_col, num_classes, heat, ROWS, BLOCK, 1, CONTIGUOUS, ACC)
    total = tl.zeros([ROWS, BLOCK], ACC)
    others = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, num_classes, BLOCK):
        mask = far & (lanes < num_classes - start)
        z = load_logits(z_row, cols + start, student_col, mask, CONTIGUOUS, ACC)
        t = load_logits(t_row, sources + start, teacher_col, mask, CONTIGUOUS, ACC)
        terms, apart = far_terms(z, t, z_max, t_max, z_sum, t_sum, heat, T_KIND, ACC)
        total += tl.where(mask, terms, 0.0)
        others += tl.where(mask & (t != t_max), apart, 0.0)
    # q - p of a class that has nearly all of p and q cancels: it is what the others lack.
    lacking = -tl.sum(others, axis=1, keep_dims=True)
    alone = t_sum < 2.0

    if grad_row is not None:
        for start in range(0, num_classes, BLOCK):
            mask = far & (lanes < num_classes - start)
            z = load_logits(z_row, cols + start, student_col, mask, CONTIGUOUS, ACC)
            t = load_logits(t_row, sources + start, teacher_col, mask, CONTIGUOUS, ACC)
            terms, apart = far_terms(z, t, z_max, t_max, z_sum, t_sum, heat, T_KIND, ACC)
            apart = tl.where((t == t_max) & alone, lacking, apart) * slope
            store_gradient(grad_row, cols + start, apart, z, y, far, mask, label_part, WITH_KD, WITH_LABEL, ACC)
    return tl.sum(total, axis=1, keep_dims=True)
