"""KD and DKPP for rows that do not fit on the chip: read once for their statistics, and again for loss and gradient.

A program takes a row in blocks of BLOCK lanes. The first reading is online: whenever a block raises the teacher's maximum,
the differences are measured anew from its largest class and centred on its mean, and what was added up is rebased. With
delta the change of every x_i, A = sum_i e^(t_i - m) expm1(x_i) becomes e^delta A + expm1(delta) S, S = sum_i e^(t_i - m),
and both are rescaled to the new maximum. Rows that need log-sum-exp are read once more in between.
"""

import triton
import triton.language as tl

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
    far_terms,
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
def _far_statistics(
    z_row, t_row, sound, student_col, teacher_col, num_classes, heat,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """The student's maximum and its sum of exponentials."""
    z_max = number(float("-inf"), ACC)
    z_total = tl.zeros([1, BLOCK], ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols, z, t = _load(start, z_row, t_row, sound, student_col, teacher_col, num_classes, ACC, BLOCK, CONTIGUOUS)
        z_largest = tl.max(z)
        if z_largest > z_max:
            z_total = z_total * exp_below(z_max, z_largest, heat, ACC)
            z_max = z_largest
        z_total += tl.where(z == float("-inf"), 0.0, exp_below(z, z_max, heat, ACC))
    return z_max, tl.sum(z_total)


@triton.jit
def _store_gradient(
    grad_row, cols, apart, z, y, sound, inside, num_classes, z_max, label_scale, rest,
    WITH_KD: tl.constexpr, WITH_LABEL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    value = tl.zeros_like(z)
    if WITH_KD:
        value += apart
    if WITH_LABEL:
        value += tl.where(cols == y, -rest, exp(z - z_max, ACC)) * label_scale
    value = tl.where(sound, value, 0.0).to(grad_row.dtype.element_ty)
    tl.store(grad_row + cols, value, mask=inside & (cols < num_classes))


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
    label_value, label_scale = rest, rest
    if y is not None:
        z_y = tl.max(load_logits(z_row, y, student_col, sound, CONTIGUOUS, ACC))
        label_value, label_scale = label_term(rest, z_y, z_max, ACC)
        label_scale *= slope_label
    log_mass = log1p(a, ACC)
    slope = divide(slope_kd, t_sum, ACC)
    is_far = (tl.max(sound.to(tl.int32)) > 0) & ~((a <= LARGEST) & (a > SMALLEST))
    far_max, far_sum, scale = t_max, t_sum, divide(number(1.0, ACC), t_sum, ACC)
    if is_far:
        far_max, far_sum = _far_statistics(
            z_row, t_row, sound, student_col, teacher_col, num_classes, heat, ACC, BLOCK, STAGES, CONTIGUOUS
        )
        scale = number(1.0, ACC)

    terms = tl.zeros([1, BLOCK], ACC)
    costs = tl.zeros([1, BLOCK], ACC)
    others = tl.zeros([1, BLOCK], ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols, z, t = _load(start, z_row, t_row, sound, student_col, teacher_col, num_classes, ACC, BLOCK, CONTIGUOUS)
        weight = exp_below(t, t_max, heat, ACC)
        if is_far:
            more, apart = far_terms(z, t, far_max, t_max, far_sum, t_sum, heat, T_KIND, ACC)
            apart *= slope_kd
        else:
            x = tempered(difference(z, t, z_r, t_r, SHORT), heat, T_KIND, ACC) - centre
            e, excess = expm1_pair(x - log_mass, ACC)
            more = weight * excess
            apart = weight * e * slope
        terms += more
        if ENTROPY:
            costs += tl.where(weight == 0.0, 0.0, weight * tempered(t_max - t, heat, T_KIND, ACC))
            others += tl.where(t == t_max, 0.0, weight)
        if grad_row is not None:
            _store_gradient(
                grad_row, cols, apart, z, y, sound, inside, num_classes, z_max, label_scale, rest,
                WITH_KD, WITH_LABEL, ACC,
            )  # fmt: skip
    value = tl.sum(terms) * scale
    if ENTROPY:
        value += log_of_sum(t_sum, tl.sum(others), ACC) + divide(tl.sum(costs), t_sum, ACC)
    return value, label_value
