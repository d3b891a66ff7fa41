"""DKPP's permutation inside Triton kernels: the bits of `backends.permutation`, in unsigned 32-bit arithmetic.

A class is addressed by its rank among the n = C - 1 that the permutation moves. What a kernel is told about n is computed
on the host, by `geometry`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.permutation import FEISTEL_FROM

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)
MIX_1: tl.constexpr = tl.constexpr(0x7FEB352D)
MIX_2: tl.constexpr = tl.constexpr(0x846CA68B)

NONE: tl.constexpr = tl.constexpr(0)
IDENTITY: tl.constexpr = tl.constexpr(1)
SWAP_OR_NOT: tl.constexpr = tl.constexpr(2)
FEISTEL: tl.constexpr = tl.constexpr(3)
FEISTEL_LARGE: tl.constexpr = tl.constexpr(4)

_MASK = 0xFFFFFFFF
_LARGE_FROM = 1 << 21
"""n from which x // b by a 32-bit reciprocal (exact while n * b < 2^32) gives way to division."""


class Permutation(NamedTuple):
    """DKPP's key."""

    sample_ids: Tensor | None
    step: Tensor | int
    seed: int


class Geometry(NamedTuple):
    """How n ranks are permuted, as kernel arguments."""

    kind: int
    a: int = 1
    b: int = 1
    reciprocal: int = 0
    """ceil(2^32 / b), as a signed word."""
    rounds: int = 0
    table: int = 0
    """Power of two >= b: entries of a round's table, or 0 where every lane evaluates the rounds itself."""
    walk: int = 0
    """Power of two >= a * b - n, the points of the Feistel domain that lie above n; 0 where there are none."""


def geometry(num_classes: int, *, tables: bool) -> Geometry:
    """For n = num_classes - 1, with or without `tables` of the round functions."""
    n = num_classes - 1
    if n < 2:
        return Geometry(IDENTITY.value)
    if n < FEISTEL_FROM:
        return Geometry(SWAP_OR_NOT.value)
    a = math.isqrt(n)
    b = -(-n // a)
    above = a * b - n
    return Geometry(
        FEISTEL_LARGE.value if n >= _LARGE_FROM else FEISTEL.value,
        a,
        b,
        _signed(-(-(1 << 32) // b)),
        10 if n < 1000 else 8,
        max(32, triton.next_power_of_2(b)) if tables else 0,
        max(32, triton.next_power_of_2(above)) if above else 0,
    )


def _mix_word(x: int) -> int:
    x ^= x >> 16
    x = (x * MIX_1.value) & _MASK
    x ^= x >> 15
    x = (x * MIX_2.value) & _MASK
    return x ^ (x >> 16)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def key_prefix(seed: int, step: Tensor | int) -> tuple[int, int]:
    """The key's two words, signed, after the seed, and after the step where that is an int."""
    k0, k1 = 0x243F6A88, 0x85A308D3
    for value in (seed, step) if isinstance(step, int) else (seed,):
        for word in (value & _MASK, (value >> 32) & _MASK):
            k0 = (_mix_word(k0 ^ word) + GOLDEN.value) & _MASK
            k1 = _mix_word((k1 + word) & _MASK) ^ k0
    return _signed(k0), _signed(k1)


def arguments(
    permutation: Permutation | None, num_classes: int, slots: int, device: torch.device, *, tables: bool
) -> dict[str, Any]:
    """A kernel's arguments, with scratch for each of the `slots` rows that are in work at a time."""
    if permutation is None:
        field, key, sample_ids, step = Geometry(NONE.value), (0, 0), None, None
    else:
        field, key = geometry(num_classes, tables=tables), key_prefix(permutation.seed, permutation.step)
        sample_ids, step = permutation.sample_ids, permutation.step
    entries, walks = slots * field.rounds * field.table, slots * field.walk
    entry = torch.uint8 if field.b <= 256 else torch.int32
    return {
        "sample_ids": None if sample_ids is None else sample_ids.contiguous(),
        "step": step if isinstance(step, Tensor) else None,
        "tables": torch.empty(entries, dtype=entry, device=device) if entries else None,
        "walks": torch.empty(walks, dtype=torch.int32, device=device) if walks else None,
        "prefix_0": key[0],
        "prefix_1": key[1],
        "feistel_a": field.a,
        "feistel_b": field.b,
        "reciprocal": field.reciprocal,
        "PERMUTE": field.kind,
        "ROUNDS": field.rounds,
        "TABLE": field.table,
        "WALK": field.walk,
    }


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * MIX_1
    x = x ^ (x >> 15)
    x = x * MIX_2
    return x ^ (x >> 16)


@triton.jit
def _absorb(k0, k1, value):
    """The two words of a 64-bit number into the key."""
    low = value.to(tl.uint32)
    high = (value >> 32).to(tl.uint32)
    k0 = mix(k0 ^ low) + GOLDEN
    k1 = mix(k1 + low) ^ k0
    k0 = mix(k0 ^ high) + GOLDEN
    return k0, mix(k1 + high) ^ k0


@triton.jit
def row_key(prefix_0, prefix_1, step, sample_ids, rows, in_range):
    """The key [ROWS, 1] of every row; `step` is a pointer, or None where the prefix holds it."""
    k0 = tl.full([], prefix_0, tl.uint32)
    k1 = tl.full([], prefix_1, tl.uint32)
    if step is not None:
        k0, k1 = _absorb(k0, k1, tl.load(step))
    if sample_ids is None:
        ids = rows.to(tl.int64)
    else:
        ids = tl.load(sample_ids + rows, mask=in_range, other=0)
    return _absorb(k0, k1, ids)


@triton.jit
def _round_key(k0, k1, i):
    return mix(k0 ^ mix(k1 + tl.full([], i, tl.uint32) * GOLDEN))


@triton.jit
def _swap_or_not(x, n, k0, k1):
    for outer in range(0, 24, 4):
        for inner in tl.static_range(4):
            i = outer + inner
            pivot = tl.umulhi(_round_key(k0, k1, 2 * i), n)
            partner = pivot - x
            partner = tl.where(pivot < x, partner + n, partner)
            coin = mix(tl.maximum(x, partner) * GOLDEN + _round_key(k0, k1, 2 * i + 1))
            x = tl.where(coin >= 0x80000000, partner, x)
    return x


@triton.jit
def _feistel(x, field, KIND: tl.constexpr, ROUNDS: tl.constexpr, TABLE: tl.constexpr):
    """A * b points, x = left * b + right. In unsigned words min(v, v - a) is v mod a for v < 2a."""
    num_classes, a, b, reciprocal, k0, k1, tables, walks = field
    a = tl.full([], a, tl.uint32)
    b = tl.full([], b, tl.uint32)
    if KIND == FEISTEL_LARGE:
        left = x // b
    else:
        left = tl.umulhi(x, tl.full([], reciprocal, tl.uint32))
    right = x - left * b
    for i in tl.static_range(0, ROUNDS, 2):
        left += _round(right, i, a, field, TABLE)
        left = tl.minimum(left, left - a)
        right += _round(left, i + 1, b, field, TABLE)
        right = tl.minimum(right, right - b)
    return left * b + right


@triton.jit
def _round(value, i, size, field, TABLE: tl.constexpr):
    num_classes, a, b, reciprocal, k0, k1, tables, walks = field
    if TABLE > 0:
        return tl.load(tables + i * TABLE + value.to(tl.int32)).to(tl.uint32)
    else:
        return tl.umulhi(mix(value * GOLDEN + _round_key(k0, k1, i)), size)


@triton.jit
def prepare(
    field, ROWS: tl.constexpr, KIND: tl.constexpr, ROUNDS: tl.constexpr, TABLE: tl.constexpr, WALK: tl.constexpr
):
    """What `permuted_rank` reads, for these rows.

    Tables: a round function has b arguments at most, and a row of C classes has them about sqrt(C) times each. Walks: where
    one that lands on point n + i of the Feistel domain ends; fewer than a of its a * b points lie above n, but Triton would
    repeat the rounds for whole blocks.
    """
    num_classes, a, b, reciprocal, k0, k1, tables, walks = field
    if TABLE > 0:
        tl.debug_barrier()  # the tables of the rows before these may still be being read
        value = tl.broadcast_to(tl.arange(0, TABLE)[None, :], [ROWS, TABLE])
        for i in tl.static_range(ROUNDS):
            size = tl.full([], a if i % 2 == 0 else b, tl.uint32)
            entry = tl.umulhi(mix(value.to(tl.uint32) * GOLDEN + _round_key(k0, k1, i)), size)
            tl.store(tables + i * TABLE + value, entry.to(tables.dtype.element_ty))
        tl.debug_barrier()
    if WALK > 0:
        n = tl.full([], num_classes - 1, tl.uint32)
        offsets = tl.broadcast_to(tl.arange(0, WALK)[None, :], [ROWS, WALK])
        start = n + offsets.to(tl.uint32)
        end = tl.where(start < tl.full([], a, tl.uint32) * tl.full([], b, tl.uint32), start, 0)
        walking = 1
        while walking > 0:
            end = tl.where(end >= n, _feistel(end, field, KIND, ROUNDS, TABLE), end)
            end = tl.where(end == start, 0, end)  # a cycle above n, which no walk from below enters or leaves
            walking = tl.max(tl.max((end >= n).to(tl.int32), axis=1), axis=0)
        tl.debug_barrier()
        tl.store(walks + offsets, end.to(tl.int32))
        tl.debug_barrier()


@triton.jit
def permuted_rank(rank, field, KIND: tl.constexpr, ROUNDS: tl.constexpr, TABLE: tl.constexpr, WALK: tl.constexpr):
    """The rank whose value each rank takes, for ranks below n = C - 1; rank n stays."""
    num_classes, a, b, reciprocal, k0, k1, tables, walks = field
    if KIND == IDENTITY:
        image = rank
    elif KIND == SWAP_OR_NOT:
        image = _swap_or_not(rank.to(tl.uint32), tl.full([], num_classes - 1, tl.uint32), k0, k1).to(tl.int32)
    else:
        x = tl.minimum(rank, num_classes - 2).to(tl.uint32)  # lanes beyond the last class stay inside the tables
        image = _feistel(x, field, KIND, ROUNDS, TABLE).to(tl.int32)
        if WALK > 0:
            above = image - (num_classes - 1)
            image = tl.where(above >= 0, tl.load(walks + above, mask=above >= 0, other=0), image)
    return tl.where(rank == num_classes - 1, rank, image)


@triton.jit
def class_of_rank(rank, kept, num_classes):
    """Rank n = C - 1 stands for the class that is kept."""
    return tl.where(rank == num_classes - 1, kept, rank + (rank >= kept).to(tl.int32))
