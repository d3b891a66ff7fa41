"""Random draws that are functions of a key: (seed, epoch, sample id, stream) -> 64 uniform bits.

There is no generator and so no state: whoever asks, in whatever order and on whatever device, gets the same bits. The
arithmetic is on int64 with wrap-around, two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014), which
every device computes alike.
"""

import torch
from torch import Tensor

ORDER = 0
"""Stream of an epoch's order."""
VIEW = 1
"""Stream of the augmented view that a sample shows in an epoch."""
SUBSET = 2
"""Stream of fixed choices among the samples of a dataset: splits and limits."""

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def bits(seed: int, epoch: int, ids: Tensor, stream: int) -> Tensor:
    """64 uniform bits for each of `ids` (int64, any shape): an int64 tensor of the same shape and device."""
    first = _key(seed, epoch, stream)
    second = _key(first)
    hashed = _mix(ids + _signed(first))
    hashed ^= _signed(second)
    return _mix(hashed)


def below(bits: Tensor, n: int) -> Tensor:
    """Uniform integers in [0, n) out of 64 uniform bits, n < 2**31; the bias is below n / 2**32."""
    if not 0 < n < 2**31:
        raise ValueError(f"n must be in [1, 2**31), got {n}")
    return (((bits >> 32) & 0xFFFFFFFF) * n) >> 32


def order(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """The positions 0..len(ids)-1 in the order in which an epoch serves the samples `ids`: int64 [N]."""
    return torch.argsort(bits(seed, epoch, ids, ORDER), stable=True)


def _mix(x: Tensor) -> Tensor:
    """The finaliser, in place. int64 shifts copy the sign bit down, hence the masks."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        if multiplier != 1:
            x *= _signed(multiplier)
    return x


def _key(*words: int) -> int:
    """One 64-bit key of some integers, each taken modulo 2**64."""
    key = _GOLDEN
    for word in words:
        key = (_mix_scalar(key ^ (word % _WORD)) + _GOLDEN) % _WORD
    return key


def _mix_scalar(x: int) -> int:
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = ((x ^ (x >> shift)) * multiplier) % _WORD
    return x


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - _WORD if word >= _WORD // 2 else word
