"""The formulas of a row, as functions inside Triton kernels: blocks [ROWS, BLOCK] of logits, statistics [ROWS, 1].

Everything is in ACC (fp32, or fp64). Products may be fused with sums (`launch.OPTIONS`), and sums stay as they are written:
`difference`, which depends on it, has no product in it.

KL is centred. With d_i = (z_i - t_i) / T up to a constant, p the teacher's distribution, c = sum_i p_i d_i, x_i = d_i - c:

    A = sum_i p_i expm1(x_i)      G = sum_i p_i (expm1(x_i) - x_i)      D = log1p(A)
    KL = G + (D - A)              q_i - p_i = p_i (expm1(x_i) exp(-D) + expm1(-D))

A - G is the rounding of c, every term of G is >= 0, and 1 + A >= 1 by Jensen's inequality: nothing cancels, whichever
class d is measured from, and one expm1 an element serves loss and gradient. (In fp32 against fp64, C = 2 to 10,000,
T = 0.5 to 20, random, near, and shifted by 0.7, 5 and 100: KL within 1.2e-6; gradient within 1.3e-6 of its largest element.)
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
SERIES_BELOW: tl.constexpr = tl.constexpr(0.5)
FAR_ABOVE: tl.constexpr = tl.constexpr(20.0)
"""x above which exp(x) shows the rounding of x, a difference of large logits. Where the student has much mass there (A > 1)
the row takes log-sum-exp, which is exact for what is largest; with little, q - p of the other classes is small, log-sum-exp
would lose it, and the centred form stays. So does a class that the student all but drops: expm1(x) ends at -1."""
MUCH_MASS: tl.constexpr = tl.constexpr(1.0)
LOST_ABOVE: tl.constexpr = tl.constexpr(4.8e8)
"""exp(FAR_ABOVE)."""
LARGEST: tl.constexpr = tl.constexpr(3.0e38)
SMALLEST: tl.constexpr = tl.constexpr(-0.75)
"""A between which the centred form holds: below, its rounding has grown by 1 / (1 + A)."""

UNIT: tl.constexpr = tl.constexpr(0)
POWER_OF_TWO: tl.constexpr = tl.constexpr(1)
ANY: tl.constexpr = tl.constexpr(2)


@triton.jit
def number(value, ACC: tl.constexpr):
    """An integer argument, or a Python number, as a 0-d tensor of ACC."""
    return tl.full([], value, ACC)


@triton.jit
def from_bits(bits, ACC: tl.constexpr):
    """A kernel's argument from its bits, as `launch.bits` has them."""
    if tl.float64 == ACC:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a / b with one rounding: Triton's `/` in fp32 is an approximation."""
    if tl.float64 == ACC:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def exp(x, ACC: tl.constexpr):
    """exp(x). In fp32 rounding x * log2(e) adds no more error than x, a difference of two logits, brings already."""
    if tl.float64 == ACC:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def log1p(a, ACC: tl.constexpr):
    """log(1 + a), a > -1 and finite: the error of rounding 1 + a divides out."""
    total = 1.0 + a
    return tl.where(total == 1.0, a, tl.log(total) * divide(a, total - 1.0, ACC))


@triton.jit
def log_of_sum(total, others, ACC: tl.constexpr):
    """log(total), total = 1 for every largest class plus `others`: by `others` where one class has nearly all of it."""
    return tl.where(total - others < 1.5, log1p(others, ACC), tl.log(total))


@triton.jit
def expm1_minus(x, ACC: tl.constexpr):
    """expm1(x) - x >= 0 for |x| <= 0.5: fp32 by a Chebyshev fit (relative error 3e-8), fp64 by Taylor's 16 terms."""
    if tl.float64 == ACC:
        total = x * (1.0 / 18) + 1.0
        for i in tl.static_range(14, -1, -1):
            total = total * x * (1.0 / (i + 3)) + 1.0
        return x * x * total * 0.5
    else:
        total = tl.fma(x, 1.9962186e-4, 1.3982197e-3)
        total = tl.fma(total, x, 8.333182e-3)
        total = tl.fma(total, x, 4.1665791e-2)
        total = tl.fma(total, x, 1.6666667e-1)
        total = tl.fma(total, x, 0.5)
        return x * x * total


@triton.jit
def expm1(x, ACC: tl.constexpr):
    return tl.where(tl.abs(x) > SERIES_BELOW, exp(x, ACC) - 1.0, x + expm1_minus(x, ACC))


@triton.jit
def expm1_pair(x, ACC: tl.constexpr):
    """expm1(x) and expm1(x) - x."""
    is_large = tl.abs(x) > SERIES_BELOW
    excess = expm1_minus(x, ACC)
    large = exp(x, ACC) - 1.0
    return tl.where(is_large, large, x + excess), tl.where(is_large, large - x, excess)


@triton.jit
def or_far(e, x):
    """e = expm1(x), infinite where x is large: then so is A, or NaN, and the row is looked at again."""
    return tl.where(x > FAR_ABOVE, float("inf"), e)


@triton.jit
def or_lost(e, weight):
    """e = expm1(x), infinite where x is large and the teacher's probability underflowed: weight * e is NaN then."""
    return tl.where((weight == 0.0) & (e > LOST_ABOVE), float("inf"), e)


@triton.jit
def tempered(d, heat, T_KIND: tl.constexpr, ACC: tl.constexpr):
    """d / T, rounded once, of finite d; heat = (T, 1 / T, log2(e) / T): by the inverse where that is exact, else with the remainder."""
    temperature, inverse, exp_scale = heat
    if T_KIND == UNIT:
        return d
    elif T_KIND == POWER_OF_TWO:
        return d * inverse
    elif tl.float64 == ACC:
        return d / temperature
    else:
        quotient = d * inverse
        return tl.fma(tl.fma(-quotient, temperature, d), inverse, quotient)


@triton.jit
def exp_below(t, t_max, heat, ACC: tl.constexpr):
    """exp((t - t_max) / T), 0 where t is -inf."""
    temperature, inverse, exp_scale = heat
    if tl.float64 == ACC:
        return tl.exp((t - t_max) / temperature)
    else:
        return tl.exp2((t - t_max) * exp_scale)


@triton.jit
def difference(z, t, z_r, t_r, SHORT: tl.constexpr):
    """(z - t) - (z_r - t_r); 0 where z and t are both -inf, and not finite where one of them is.

    By TwoSum: s + e is z - t without error. Where both came from 16 bits (SHORT), z - z_r and t - t_r are exact in fp32
    unless z is 2^-13 of z_r or less (2^-16 in bf16), and then within half a unit of the larger.
    """
    if SHORT:
        d = (z - z_r) - (t - t_r)
    else:
        s = z - t
        b = s - z
        e = (z - (s - b)) - (t + b)
        s_r = z_r - t_r
        b_r = s_r - z_r
        e_r = (z_r - (s_r - b_r)) - (t_r + b_r)
        d = (s - s_r) + (e - e_r)
    return tl.where((z == t) & (t == float("-inf")), 0.0, d)


@triton.jit
def far_terms(z, t, z_max, t_max, z_sum, t_sum, heat, T_KIND: tl.constexpr, ACC: tl.constexpr):
    """By log-sum-exp, with the row sums of exp_below: the terms of KL, and q - p."""
    q = exp_below(z, z_max, heat, ACC) * divide(number(1.0, ACC), z_sum, ACC)
    p = exp_below(t, t_max, heat, ACC) * divide(number(1.0, ACC), t_sum, ACC)
    z_log = tl.where(z == float("-inf"), z, tempered(z - z_max, heat, T_KIND, ACC)) - tl.log(z_sum)
    u = z_log - (tempered(t - t_max, heat, T_KIND, ACC) - tl.log(t_sum))
    apart = q - p
    terms = tl.where(tl.abs(u) < SERIES_BELOW, p * expm1_minus(u, ACC), apart - p * u)
    terms = tl.where(p == 0.0, q, terms)
    return tl.where(terms < 0.0, 0.0, terms), apart


@triton.jit
def centred_kl(a, g, log_mass):
    """KL from A, G and D = log1p(A). Above 4 the rounding of c is nothing beside D, and A - G would lose digits."""
    return tl.where(a < 4.0, g + (log_mass - a), log_mass)


@triton.jit
def label_term(rest, z_y, z_max, ACC: tl.constexpr):
    """Cross-entropy from rest = sum of exp(z - z_max) over the other classes, and 1 / the sum over all.

    Exact also where the label is nearly certain.
    """
    total = rest + exp(z_y - z_max, ACC)
    ce = tl.where(z_y == z_max, log1p(rest, ACC), tl.log(total) + (z_max - z_y))
    return ce, divide(number(1.0, ACC), total, ACC)
