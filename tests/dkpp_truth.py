"""DKPP's permutation by its definition, one output at a time in Python integers, and tests of uniformity."""

import itertools
import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


class Permutation:
    """perm(x) for x in 0..n-1 under (seed, step, sample id)."""

    def __init__(self, n: int, seed: int, step: int, sample_id: int) -> None:
        self.n = n
        k0, k1 = 0x243F6A88, 0x85A308D3
        for number in (seed, step, sample_id):
            for word in (number & WORD, number >> 32 & WORD):
                k0 = mix(k0 ^ word) + GOLDEN & WORD
                k1 = mix(k1 + word & WORD) ^ k0
        self.keys = [mix(k0 ^ mix(k1 + i * GOLDEN & WORD)) for i in range(48)]

    def __call__(self, x: int) -> int:
        if self.n < 2:
            return x
        return self.swap_or_not(x) if self.n <= 98 else self.feistel(x)

    def swap_or_not(self, x: int) -> int:
        for i in range(24):
            y = (self.keys[2 * i] * self.n >> 32) - x
            if y < 0:
                y += self.n
            if mix(max(x, y) * GOLDEN + self.keys[2 * i + 1] & WORD) >> 31:
                x = y
        return x

    def feistel(self, x: int) -> int:
        a = math.isqrt(self.n)
        b = (self.n + a - 1) // a
        while True:
            left, right = divmod(x, b)
            for i in range(10 if self.n < 1000 else 8):
                key = self.keys[i]
                if i % 2 == 0:
                    left = (left + (mix(right * GOLDEN + key & WORD) * a >> 32)) % a
                else:
                    right = (right + (mix(left * GOLDEN + key & WORD) * b >> 32)) % b
            x = left * b + right
            if x < self.n:
                return x


def sources(argmax: int, classes: int, seed: int, step: int, sample_id: int) -> list[int]:
    """For every class the class whose value it takes."""
    perm = Permutation(classes - 1, seed, step, sample_id)
    result = []
    for j in range(classes):
        if j == argmax:
            result.append(j)
            continue
        image = perm(j - (j > argmax))
        result.append(image + (image >= argmax))
    return result


def chi_square(counts: Tensor, freedom: int | None = None) -> float:
    """The probability that a uniform generator's counts are this uneven, or more."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1 if freedom is None else freedom
    return torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic.double() / 2).item()


def position_p(ranks: Tensor) -> float:
    """Permutations [N, n]: does every rank go everywhere equally often? Rows and columns of the n x n counts are fixed,
    which leaves (n - 1)^2 degrees of freedom and shrinks the statistic by (n - 1) / n."""
    samples, n = ranks.shape
    counts = torch.stack([torch.bincount(column, minlength=n) for column in ranks.unbind(1)]).double()
    statistic = ((counts - samples / n) ** 2 * n / samples).sum() * (n - 1) / n
    return torch.special.gammaincc(torch.tensor((n - 1) ** 2 / 2.0).double(), statistic / 2).item()


def pair_p(ranks: Tensor, first: int, second: int) -> float:
    """Do two ranks go to every ordered pair of places equally often?"""
    n = ranks.shape[1]
    counts = torch.bincount(ranks[:, first] * n + ranks[:, second], minlength=n * n).double()
    return chi_square(counts[~torch.eye(n, dtype=torch.bool).flatten()])


def whole_p(ranks: Tensor) -> float:
    """Does each of the n! permutations come equally often?"""
    n = ranks.shape[1]
    powers = n ** torch.arange(n)
    codes = (torch.tensor(list(itertools.permutations(range(n)))) * powers).sum(1)
    counts = torch.bincount((ranks * powers).sum(1), minlength=n**n).double()
    assert counts.sum() == counts[codes].sum()
    return chi_square(counts[codes])
