"""KD and DKPP for rows that stay on the chip: every logit is read once.

A program holds ROWS rows as PARTS blocks of BLOCK lanes, so that 10,000 classes take 5 times 2048 lanes and not 16,384.
"""

import triton
import triton.language as tl

from ban_fast.backends.triton.distill_far import far_rows, store_gradient
from ban_fast.backends.triton.parts import largest, load_parts, total
from ban_fast.backends.triton.row_math import (
    LARGEST,
    MUCH_MASS,
    centred_kl,
    difference,
    divide,
    exp,
    exp_below,
    expm1,
    expm1_pair,
    label_term,
    log1p,
    log_of_sum,
    or_far,
    or_lost,
    tempered,
)
from ban_fast.backends.triton.rows import load_logits


@triton.jit
def _student_at_largest(z, t, t_max, PARTS: tl.constexpr):
    """[ROWS, 1] the largest student logit among the classes where the teacher's is t_max."""
    chosen = ()
    for p in tl.static_range(PARTS):
        chosen = chosen + (tl.where(t[p] == t_max, z[p], float("-inf")),)
    return largest(chosen, PARTS)


@triton.jit
def _entropy(
    t_row, sources, readable, teacher_col, num_classes, t_max, t_sum, heat,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr, T_KIND: tl.constexpr,
):  # fmt: skip
    """[ROWS, 1] the teacher's entropy, from the cache: beside everything else its terms would not fit in registers."""
    lanes = tl.arange(0, BLOCK)[None, :]
    costs = tl.zeros([ROWS, BLOCK], ACC)
    others = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, num_classes, BLOCK):
        mask = readable & (lanes < num_classes - start)
        t = load_logits(t_row, sources + start, teacher_col, mask, CONTIGUOUS, ACC)
        weight = exp_below(t, t_max, heat, ACC)
        costs += tl.where(weight == 0.0, 0.0, weight * tempered(t_max - t, heat, T_KIND, ACC))
        others += tl.where(t == t_max, 0.0, weight)
    cost = divide(tl.sum(costs, axis=1, keep_dims=True), t_sum, ACC)
    return log_of_sum(t_sum, tl.sum(others, axis=1, keep_dims=True), ACC) + cost


@triton.jit
def _near(
    z, t, t_max, sound, slope, heat,
    PARTS: tl.constexpr, T_KIND: tl.constexpr, SHORT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The centred form: KL, slope * (q - p), A (not finite where the form does not hold), and the sum of t's exponentials."""
    z_r = _student_at_largest(z, t, t_max, PARTS)
    weight = ()
    d = ()
    products = ()
    for p in tl.static_range(PARTS):
        weight = weight + (exp_below(t[p], t_max, heat, ACC),)
        d = d + (tempered(difference(z[p], t[p], z_r, t_max, SHORT), heat, T_KIND, ACC),)
        products = products + (weight[p] * d[p],)
    t_sum = total(weight, PARTS)
    centre = divide(total(products, PARTS), t_sum, ACC)

    e = ()
    a_parts = ()
    g_parts = ()
    for p in tl.static_range(PARTS):
        x = d[p] - centre
        e_p, g_p = expm1_pair(x, ACC)
        e = e + (e_p,)
        a_parts = a_parts + (weight[p] * or_far(e_p, x),)
        g_parts = g_parts + (weight[p] * g_p,)
    a = divide(total(a_parts, PARTS), t_sum, ACC)
    far = sound & ~(a <= LARGEST)
    if tl.max(tl.max(far.to(tl.int32), axis=1), axis=0) > 0:
        a_parts = ()
        for p in tl.static_range(PARTS):
            a_parts = a_parts + (weight[p] * or_lost(e[p], weight[p]),)
        mass = divide(total(a_parts, PARTS), t_sum, ACC)
        a = tl.where(far, tl.where(mass <= MUCH_MASS, mass, float("inf")), a)
    g = divide(total(g_parts, PARTS), t_sum, ACC)
    log_mass = log1p(a, ACC)
    by_e = exp(-log_mass, ACC)
    offset = expm1(-log_mass, ACC)
    scale = divide(slope, t_sum, ACC)
    apart = ()
    for p in tl.static_range(PARTS):  # the slope comes last: an fp16 gradient's is up to 2^15, and e ends at e^88
        apart = apart + (weight[p] * (e[p] * by_e + offset) * scale,)
    return centred_kl(a, g, log_mass), apart, a, t_sum


@triton.jit
def _label(z, z_y, y, cols, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Cross-entropy with the label, and what its gradient needs: the student's maximum, the sum of exp(z - maximum) over the
    other classes, and 1 / the sum over all."""
    z_max = largest(z, PARTS)
    others = ()
    for p in tl.static_range(PARTS):
        others = others + (tl.where(cols == y - p * BLOCK, 0.0, exp(z[p] - z_max, ACC)),)
    rest = total(others, PARTS)
    ce, scale = label_term(rest, z_y, z_max, ACC)
    return ce, z_max, rest, scale


@triton.jit
def distill_tile(
    z_row, t_row, grad_row, cols, sources, inside, readable, sound, y, student_col, teacher_col, num_classes,
    heat, slope_kd, slope_label,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ENTROPY: tl.constexpr, WITH_KD: tl.constexpr, WITH_LABEL: tl.constexpr, T_KIND: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """[ROWS, 1] the KD term and the label term of a tile, whose gradient is stored.

    cols are the classes of the first part's lanes, sources those whose teacher value they take. Rows that do not count are
    read too: waiting for the labels would take longer.
    """
    z_masks = ()
    t_masks = ()
    for p in tl.static_range(PARTS):
        in_row = tl.arange(0, BLOCK)[None, :] < num_classes - p * BLOCK
        z_masks = z_masks + (in_row if ROWS == 1 else inside & in_row,)
        t_masks = t_masks + (readable & in_row,)
    z = load_parts(z_row, cols, z_masks, student_col, BLOCK, PARTS, CONTIGUOUS, ACC)
    t = load_parts(t_row, sources, t_masks, teacher_col, BLOCK, PARTS, CONTIGUOUS, ACC)
    t_max = largest(t, PARTS)
    label_value = tl.zeros([ROWS, 1], ACC)
    label_part = (label_value, label_value, label_value)
    if y is not None:
        z_y = load_logits(z_row, y, student_col, inside, CONTIGUOUS, ACC)
        label_value, z_max, rest, scale = _label(z, z_y, y, cols, BLOCK, PARTS, ACC)
        label_part = (z_max, rest, scale * slope_label)

    kd_value, apart, a, t_sum = _near(z, t, t_max, sound, slope_kd, heat, PARTS, T_KIND, SHORT, ACC)
    far = sound & ~(a <= LARGEST)
    if grad_row is not None:
        for p in tl.static_range(PARTS):
            z_p = z[p]
            label = y
            if y is not None:
                label = y - p * BLOCK
            if WITH_LABEL and PARTS > 1:  # from the cache: three values a lane would not fit in registers
                z_p = load_logits(z_row, cols + p * BLOCK, student_col, z_masks[p], CONTIGUOUS, ACC)
            store_gradient(
                grad_row + p * BLOCK, cols, apart[p], z_p, label, sound, z_masks[p] & ~far, label_part,
                WITH_KD, WITH_LABEL, ACC,
            )  # fmt: skip
    if tl.max(tl.max(far.to(tl.int32), axis=1), axis=0) > 0:
        far_value = far_rows(
            z_row, t_row, grad_row, cols, sources, far, y, student_col, teacher_col, num_classes, t_max, t_sum, heat,
            slope_kd, label_part, ACC, ROWS, BLOCK, CONTIGUOUS, WITH_KD, WITH_LABEL, T_KIND,
        )  # fmt: skip
        kd_value = tl.where(far, far_value, kd_value)
    if ENTROPY:
        kd_value += _entropy(
            t_row, sources, readable, teacher_col, num_classes, t_max, t_sum, heat,
            ACC, ROWS, BLOCK, CONTIGUOUS, T_KIND,
        )  # fmt: skip
    return kd_value, label_value
