"""DKPP's teacher: which class each class takes its value from, for rows in registers and for rows of any length."""

import triton
import triton.language as tl

from ban_fast.backends.triton.permute import class_of_rank, permuted_rank, prepare
from ban_fast.backends.triton.rows import load_logits


@triton.jit
def kept_class(
    row, col_stride, readable, num_classes, ROWS: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr
):
    """[ROWS, 1] the class that stays: the lowest with the largest logit, in fp32."""
    best = tl.full([ROWS, 1], float("-inf"), tl.float32)
    kept = tl.zeros([ROWS, 1], tl.int32)
    for start in range(0, num_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        t = load_logits(row, cols, col_stride, readable & (cols < num_classes), CONTIGUOUS, tl.float32)
        largest = tl.max(t, axis=1, keep_dims=True)
        first = tl.min(tl.where(t == largest, cols, num_classes - 1), axis=1, keep_dims=True)
        kept = tl.where(largest > best, first, kept)
        best = tl.maximum(best, largest)
    return kept


@triton.jit
def ranked_classes(
    row, col_stride, readable, field,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr, PERMUTE: tl.constexpr, ROUNDS: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """For rows that fit in BLOCK lanes, lanes being ranks: each lane's class, and the class whose value it takes.

    The permutation does not need the teacher's argmax, and is under way while that is still being read.
    """
    num_classes = field[0]
    prepare(field, ROWS, PERMUTE, ROUNDS, 0, WALK)
    lanes = tl.arange(0, BLOCK)[None, :]
    t = load_logits(row, lanes, col_stride, readable & (lanes < num_classes), CONTIGUOUS, tl.float32)
    image = permuted_rank(tl.broadcast_to(lanes, [ROWS, BLOCK]), field, PERMUTE, ROUNDS, 0, WALK)
    largest = tl.max(t, axis=1, keep_dims=True)
    kept = tl.min(tl.where(t == largest, lanes, num_classes - 1), axis=1, keep_dims=True)
    return class_of_rank(lanes, kept, num_classes), class_of_rank(image, kept, num_classes)


@triton.jit
def source_classes(
    cols, kept, field, PERMUTE: tl.constexpr, ROUNDS: tl.constexpr, TABLE: tl.constexpr, WALK: tl.constexpr
):
    """The class whose value each class of cols takes; `prepare` comes first."""
    rank = tl.where(cols == kept, field[0] - 1, cols - (cols > kept).to(tl.int32))
    return class_of_rank(permuted_rank(rank, field, PERMUTE, ROUNDS, TABLE, WALK), kept, field[0])


@triton.jit
def write_permuted(
    row, out, col_stride, readable, field,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CONTIGUOUS: tl.constexpr, PERMUTE: tl.constexpr, ROUNDS: tl.constexpr,
    TABLE: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """The permuted rows to out [ROWS, 1], pointers to scratch that these programs read again and again: it stays in the cache.

    KD from there costs less than to permute as often as a row is read, and holds no index in a register. A program reads
    what it wrote itself: barriers, which order a program's own accesses to memory whatever threads make them, are enough,
    one before writing (the row before may still be being read) and one after. The same goes for `prepare`'s tables.
    """
    num_classes = field[0]
    prepare(field, ROWS, PERMUTE, ROUNDS, TABLE, WALK)
    kept = kept_class(row, col_stride, readable, num_classes, ROWS, BLOCK, CONTIGUOUS)
    tl.debug_barrier()
    for start in range(0, num_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        inside = cols < num_classes
        source = source_classes(cols, kept, field, PERMUTE, ROUNDS, TABLE, WALK)
        if CONTIGUOUS:
            value = tl.load(row + source, mask=readable & inside)
        else:
            value = tl.load(row + source * col_stride, mask=readable & inside)
        tl.store(out + cols, value, mask=inside & readable)
    tl.debug_barrier()
