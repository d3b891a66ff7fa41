"""KD and DKPP for rows that do not fit on the chip: read once for their statistics, and again for loss and gradient.

A program takes a row in blocks of BLOCK lanes. The first reading is online: whenever a block raises the teacher's maximum,
the differences are measured anew from its largest class and centred on its mean, and what was added up is rebased. With
delta the change of every x_i, A = sum_i e^(t_i - m) expm1(x_i) becomes e^delta A + expm1(delta) S, S = sum_i e^(t_i - m),
and both are rescaled to the new maximum.
"""

import triton
import triton.language as tl

from ban_fast.backends.triton.distill_far import far_rows, store_gradient
from ban_fast.backends.triton.row_math import (
    FAR_ABOVE,
    LARGEST,
    MUCH_MASS,
    SMALLEST,
    difference,
    divide,
    exp,
    exp_below,
    expm1,
    expm1_pair,
    label_term,
    log1p,
    log_of_sum,
    number,
    or_lost,
    tempered,
)
from ban_fast.backends.triton.rows import load_logits


@triton.jit
def _load(
    start, z_row, t_row, sound, student_col, teacher_col, num_classes,
    ACC: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """The classes of a block, and student's and teacher's logits."""
    cols = start + tl.arange(0, BLOCK)[None, :]
    mask = sound & (cols < num_classes)
    z = load_logits(z_row, cols, student_col, mask, CONTIGUOUS, ACC)
    return cols, z, load_logits(t_row, cols, teacher_col, mask, CONTIGUOUS, ACC)


@triton.jit
def _statistics(
    z_row, t_row, sound, y, student_col, teacher_col, num_classes, heat,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr, T_KIND: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The first reading: (t_max, S, z_r, t_r, centre, A / S) for KD and (z_max, rest) for the label term.

    x_i is ((z_i - t_i) - (z_r - t_r)) / T - centre.
    """
    nothing = number(float("-inf"), ACC)
    t_max, z_max = nothing, nothing
    z_r, t_r, centre = number(0.0, ACC), number(0.0, ACC), number(0.0, ACC)
    t_total = tl.zeros([1, BLOCK], ACC)
    a_total = tl.zeros([1, BLOCK], ACC)
    rest_total = tl.zeros([1, BLOCK], ACC)
    highest = tl.full([1, BLOCK], 0.0, ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols, z, t = _load(start, z_row, t_row, sound, student_col, teacher_col, num_classes, ACC, BLOCK, CONTIGUOUS)
        largest = tl.max(t)
        if largest > t_max:
            z_new = tl.max(tl.where(t == largest, z, float("-inf")))
            weight = exp_below(t, largest, heat, ACC)
            d = tempered(difference(z, t, z_new, largest, SHORT), heat, T_KIND, ACC)
            new_centre = divide(tl.sum(weight * d), tl.sum(weight), ACC)
            delta = tempered(difference(z_r, t_r, z_new, largest, SHORT), heat, T_KIND, ACC) + (centre - new_centre)
            delta = tl.where(t_max == float("-inf"), 0.0, delta)
            rescale = exp_below(t_max, largest, heat, ACC)
            a_total = rescale * (exp(delta, ACC) * a_total + expm1(delta, ACC) * t_total)
            t_total = rescale * t_total
            z_r, t_r, centre, t_max = z_new, largest, new_centre, largest
        weight = tl.where(t == float("-inf"), 0.0, exp_below(t, t_max, heat, ACC))
        x = tempered(difference(z, t, z_r, t_r, SHORT), heat, T_KIND, ACC) - centre
        t_total += weight
        a_total += weight * or_lost(expm1(x, ACC), weight)
        highest = tl.maximum(highest, x)
        if y is not None:
            z_largest = tl.max(z)
            if z_largest > z_max:
                rest_total = rest_total * exp(z_max - z_largest, ACC)
                z_max = z_largest
            rest_total += tl.where((cols == y) | (z == float("-inf")), 0.0, exp(z - z_max, ACC))
    t_sum = tl.sum(t_total)
    rest = tl.sum(rest_total) + (z_max - z_max)  # NaN where z_max is not finite
    a = divide(tl.sum(a_total), t_sum, ACC)
    a = tl.where((tl.max(highest) > FAR_ABOVE) & (a > MUCH_MASS), float("inf"), a)
    return t_max, t_sum, z_r, t_r, centre, a, z_max, rest


@triton.jit
def distill_row(
    z_row, t_row, grad_row, inside, sound, y, student_col, teacher_col, num_classes, heat, slope_kd, slope_label,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr, ENTROPY: tl.constexpr, WITH_KD: tl.constexpr,
    WITH_LABEL: tl.constexpr, T_KIND: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """[1, 1] the KD term and the label term of a row, whose gradient is stored."""
    t_max, t_sum, z_r, t_r, centre, a, z_max, rest = _statistics(
        z_row, t_row, sound, y, student_col, teacher_col, num_classes, heat,
        ACC, BLOCK, STAGES, CONTIGUOUS, T_KIND, SHORT,
    )  # fmt: skip
    label_value = rest
    label_part = (z_max, rest, rest)
    if y is not None:
        z_y = tl.max(load_logits(z_row, y, student_col, sound, CONTIGUOUS, ACC))
        label_value, scale = label_term(rest, z_y, z_max, ACC)
        label_part = (z_max, rest, scale * slope_label)
    t_sum, a = tl.full([1, 1], t_sum, ACC), tl.full([1, 1], a, ACC)
    log_mass = log1p(a, ACC)
    slope = divide(slope_kd, t_sum, ACC)
    far = sound & ~((a <= LARGEST) & (a > SMALLEST))

    terms = tl.zeros([1, BLOCK], ACC)
    costs = tl.zeros([1, BLOCK], ACC)
    others = tl.zeros([1, BLOCK], ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols, z, t = _load(start, z_row, t_row, sound, student_col, teacher_col, num_classes, ACC, BLOCK, CONTIGUOUS)
        weight = exp_below(t, t_max, heat, ACC)
        x = tempered(difference(z, t, z_r, t_r, SHORT), heat, T_KIND, ACC) - centre
        e, excess = expm1_pair(x - log_mass, ACC)
        terms += weight * excess
        if ENTROPY:
            costs += tl.where(weight == 0.0, 0.0, weight * tempered(t_max - t, heat, T_KIND, ACC))
            others += tl.where(t == t_max, 0.0, weight)
        if grad_row is not None:
            mask = inside & ~far & (cols < num_classes)
            store_gradient(grad_row, cols, weight * e * slope, z, y, sound, mask, label_part, WITH_KD, WITH_LABEL, ACC)
    value = tl.sum(terms, axis=1, keep_dims=True) * divide(number(1.0, ACC), t_sum, ACC)
    if tl.max(far.to(tl.int32)) > 0:
        cols = tl.arange(0, BLOCK)[None, :]
        value = far_rows(
            z_row, t_row, grad_row, cols, cols, far, y, student_col, teacher_col, num_classes, t_max, t_sum, heat,
            slope_kd, label_part, ACC, 1, BLOCK, CONTIGUOUS, WITH_KD, WITH_LABEL, T_KIND,
        )  # fmt: skip
    if ENTROPY:
        value += log_of_sum(t_sum, tl.sum(others), ACC) + divide(tl.sum(costs), t_sum, ACC)
    return value, label_value
