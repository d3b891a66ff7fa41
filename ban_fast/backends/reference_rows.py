"""The formulas of one row, for a whole matrix at once, in eager torch: what every other backend is held against.

Everything is in the arithmetic type ("acc": fp32, or fp64 for fp64 students) and depends on no value on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SERIES_BELOW = {torch.float32: 0.1, torch.float64: 0.005}
"""|u| below which expm1(u) - u comes from its series: the terms left out are under u^4 / 360 of it (3e-7, 2e-12), and
above it the subtraction loses no more than that."""
LEAPING = 20.0
"""d above which p expm1(d) shows the rounding of d, and is nothing where p underflowed: such a class is weighed by its
own logit. Measured with one class at d = 21 to 90 and A = e^-12 to e^4: the gradient within 8e-7 so, else 1e-5."""
LSE_ABOVE_A, LSE_BELOW_MASS = 1.0, 0.25
"""A above which a row with leaping classes, and 1 + A below which any row, takes log-sum-exp. Log-sum-exp was measured
within 2e-7 of the gradient at A = 1, and 2e-2 at A = e^-12, for a teacher whose other classes have e^-14. A's rounding
error grows as 1 / (1 + A), and a student that much more peaked than its teacher has no close differences to lose."""


class KdRows(NamedTuple):
    """The KD term of every row at unit weight."""

    kl: Tensor
    """[R] KL(p_T || q_T), never negative."""
    difference: Tensor
    """[R, C] q_T - p_T: the gradient of `kl` times T."""
    entropy: Tensor
    """[R] H(p_T): what cross-entropy adds to `kl`."""


def kd_rows(student: Tensor, teacher: Tensor, temperature: float) -> KdRows:
    """KL between rows of logits [R, C], from exact differences of logits."""
    student_dead, teacher_dead = student == -torch.inf, teacher == -torch.inf
    alive = ~(student_dead | teacher_dead)
    t_max, r = teacher.max(dim=1, keepdim=True)
    t_shifted = (teacher - t_max) / temperature
    t_exp = t_shifted.exp()
    t_sum = t_exp.sum(dim=1, keepdim=True)
    p = t_exp / t_sum

    d = _exact_difference(student, teacher, alive, r) / temperature
    excess = t_exp * d.expm1()
    if_leaping = (student - student.gather(1, r)) / temperature
    excess = torch.where(d > LEAPING, if_leaping.exp() - t_exp, excess)
    near, far = _near_rows(p, excess / t_sum, d), _far_rows(student, t_shifted, t_sum, p, temperature)
    lone = (student_dead ^ teacher_dead).any(dim=1, keepdim=True)
    take_far = lone | ((d > LEAPING).any(dim=1, keepdim=True) & (near.a > LSE_ABOVE_A)) | (1 + near.a < LSE_BELOW_MASS)

    kl_terms = torch.where(take_far, far.kl_terms, near.kl_terms).clamp_min(0)
    difference = torch.where(take_far, far.difference, near.difference)
    surprise = torch.where(p == 0, 0, p * -t_shifted)
    others = t_exp.scatter(1, r, 0)  # log S by what they have: in S itself, a certain teacher's is rounded off
    entropy = others.sum(dim=1).log1p() + surprise.sum(dim=1)
    return KdRows(kl_terms.sum(dim=1), difference, entropy)


def _exact_difference(student: Tensor, teacher: Tensor, alive: Tensor, r: Tensor) -> Tensor:
    """(z_i - t_i) - (z_r - t_r) [R, C], 0 where either is -inf. TwoSum: s + e is z - t without error."""
    z, t = student.where(alive, 0), teacher.where(alive, 0)
    s = z - t
    b = s - z
    e = (z - (s - b)) - (t + b)
    return ((s - s.gather(1, r)) + (e - e.gather(1, r))).where(alive, 0)


class _Branch(NamedTuple):
    kl_terms: Tensor  # [R, C]
    difference: Tensor  # [R, C]
    a: Tensor  # [R, 1] sum_i p_i expm1(d_i); unused by the far branch


def _near_rows(p: Tensor, excess: Tensor, d: Tensor) -> _Branch:
    """From d_i = log(q_i / p_i) - log(q_r / p_r) and p_i expm1(d_i): no step cancels."""
    a = excess.sum(dim=1, keepdim=True)
    log_mass = a.log1p()
    u = d - log_mass
    difference = excess * (-log_mass).exp() + p * (-log_mass).expm1()
    kl_terms = torch.where(u.abs() < SERIES_BELOW[u.dtype], p * _expm1_minus_argument(u), difference - p * u)
    return _Branch(kl_terms, difference, a)


def _far_rows(student: Tensor, t_shifted: Tensor, t_sum: Tensor, p: Tensor, temperature: float) -> _Branch:
    """By log-sum-exp: where student and teacher are far apart, or one of them alone is -inf somewhere."""
    z_shifted = (student - student.amax(dim=1, keepdim=True)) / temperature
    z_exp = z_shifted.exp()
    z_sum = z_exp.sum(dim=1, keepdim=True)
    q = z_exp / z_sum
    u = (z_shifted - z_sum.log()) - (t_shifted - t_sum.log())
    difference = q - p
    kl_terms = torch.where(u.abs() < SERIES_BELOW[u.dtype], p * _expm1_minus_argument(u), difference - p * u)
    return _Branch(torch.where(p == 0, q, kl_terms), difference, p)


def _expm1_minus_argument(u: Tensor) -> Tensor:
    """exp(u) - 1 - u >= 0, for small u."""
    return u * u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120))))


class LabelRows(NamedTuple):
    """The label term of every row at unit weight."""

    ce: Tensor
    """[R] cross-entropy with the label."""
    difference: Tensor
    """[R, C] q - onehot(label): its gradient."""


def label_rows(student: Tensor, labels: Tensor) -> LabelRows:
    """Cross-entropy of logits [R, C] with labels [R], each in 0..C-1, exact also where the label is nearly certain."""
    y = labels.unsqueeze(1)
    z_max = student.amax(dim=1, keepdim=True)
    z_y = student.gather(1, y)
    others = (student - z_max).exp().scatter(1, y, 0)
    rest = others.sum(dim=1, keepdim=True)
    total = rest + (z_y - z_max).exp()
    ce = torch.where(z_y == z_max, rest.log1p(), total.log() + (z_max - z_y))
    difference = (others / total).scatter(1, y, -rest / total)
    return LabelRows(ce.squeeze(1), difference)


def max_probability(teacher: Tensor) -> Tensor:
    """[R] the largest softmax output of every row of logits [R, C]."""
    return 1 / (teacher - teacher.amax(dim=1, keepdim=True)).exp().sum(dim=1)


def log_probability(teacher: Tensor, labels: Tensor) -> Tensor:
    """[R] log softmax of logits [R, C] at labels [R]."""
    shifted = teacher - teacher.amax(dim=1, keepdim=True)
    # torch's own softmax adds up one by one in fp32: 5e-6 at 10,000 classes, where sum() stays within 1e-7.
    return shifted.gather(1, labels.unsqueeze(1)).squeeze(1) - shifted.exp().sum(dim=1).log()


def probabilities(teacher: Tensor, temperature: float) -> Tensor:
    """[R, C] softmax of logits [R, C] over the temperature; a sum as in `log_probability`."""
    exp = ((teacher - teacher.amax(dim=1, keepdim=True)) / temperature).exp()
    return exp / exp.sum(dim=1, keepdim=True)
