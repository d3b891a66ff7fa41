"""What every loss kernel does around its rows: which of them count, totals over all rows, and the end of the reduction."""

import triton
import triton.language as tl

from ban_fast.backends.triton.row_math import divide, exp_below, number

UNREDUCED: tl.constexpr = tl.constexpr(0)
SUM: tl.constexpr = tl.constexpr(1)
MEAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def select_rows(rows, labels, teacher_rows, num_rows, num_teacher_rows, num_classes, ignore_index):
    """Of rows: whether each is kept, whether its teacher's row can be read, whether it is sound (kept, and no index out of
    range), its label, and its teacher's row, 0 where they are out of range."""
    kept = rows < num_rows
    readable = kept
    in_range = kept
    label = tl.zeros_like(rows)
    teacher_row = rows.to(tl.int64)
    if labels is not None:
        wanted = tl.load(labels + rows, mask=kept, other=0)
        in_range = (wanted >= 0) & (wanted < num_classes)
        kept = kept & (wanted != ignore_index)
        label = tl.where(in_range, wanted, 0).to(tl.int32)
    if teacher_rows is not None:
        teacher_row = tl.load(teacher_rows + rows, mask=readable, other=0)
        readable = readable & (teacher_row >= 0) & (teacher_row < num_teacher_rows)
        teacher_row = tl.where(readable, teacher_row, 0)
    return kept, readable, kept & in_range & readable, label, teacher_row


@triton.jit
def count_kept(labels, first, step, num_rows, ignore_index, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The number of rows kept among blocks first, first + step, ... of BLOCK rows."""
    total = tl.zeros([BLOCK], tl.int32)
    for block in range(first, tl.cdiv(num_rows, BLOCK), step):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(labels + rows, mask=rows < num_rows, other=ignore_index)
        total += (label != ignore_index).to(tl.int32)
    return tl.sum(total, axis=0).to(ACC)


@triton.jit
def total_of(partials, count, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The sum of `count` partial sums in a fixed order; past the first-level cache, whose lines may be older than they."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def kept_count(
    labels, counts, num_counts, num_rows, ignore_index,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the loss is divided by: for a mean the rows kept, at least 1. Partial `counts` where they are given."""
    if REDUCTION != MEAN:
        return number(1.0, ACC)
    elif labels is None:
        return number(num_rows, ACC)
    elif counts is None:
        return tl.maximum(count_kept(labels, 0, 1, num_rows, ignore_index, BLOCK, ACC), 1.0)
    else:
        return tl.maximum(total_of(counts, num_counts, BLOCK, ACC), 1.0)


@triton.jit
def load_logits(row, cols, col_stride, mask, CONTIGUOUS: tl.constexpr, ACC: tl.constexpr):
    """Logits at cols [1 or ROWS, BLOCK] of rows that begin at the pointers row [ROWS, 1]; -inf where masked."""
    if CONTIGUOUS:
        return tl.load(row + cols, mask=mask, other=float("-inf")).to(ACC)
    else:
        return tl.load(row + cols * col_stride, mask=mask, other=float("-inf")).to(ACC)


@triton.jit
def max_and_sum(
    row, readable, col_stride, num_classes, heat,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[ROWS, 1] the maximum of rows of any length, and the sum of exp((t - maximum) / T), in one reading."""
    t_max = tl.full([ROWS, 1], float("-inf"), ACC)
    total = tl.zeros([ROWS, BLOCK], ACC)
    for start in tl.range(0, num_classes, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)[None, :]
        t = load_logits(row, cols, col_stride, readable & (cols < num_classes), CONTIGUOUS, ACC)
        largest = tl.maximum(t_max, tl.max(t, axis=1, keep_dims=True))
        rescale = tl.where(t_max == largest, 1.0, exp_below(t_max, largest, heat, ACC))
        total = total * rescale + tl.where(t == float("-inf"), 0.0, exp_below(t, largest, heat, ACC))
        t_max = largest
    return t_max, tl.sum(total, axis=1, keep_dims=True) + (t_max - t_max)  # NaN where no logit is finite


@triton.jit
def settled(value, kept, sound):
    """A row's value as the loss has it: 0 where ignored, NaN where an index is out of range."""
    return tl.where(sound, value, tl.where(kept, float("nan"), 0.0))


@triton.jit
def is_last_program(counter):
    """Whether every other program has stored its results: true in one program, for which they are visible then.

    In the terms of PTX's memory model: a program's stores come before its barrier, and that before the addition, by one of
    its threads, which releases them to the GPU (acq_rel, scope gpu: what the thread has observed by the barrier is released
    with its own). Additions to one counter follow one another, each reading what the one before wrote, so the last one
    acquires what all have released. Its answer reaches the other threads through a barrier again, and their loads
    (`total_of`) come after that; they bypass the first-level cache, so that nothing rests on how that is emptied. The counter
    is back at 0 before the kernel ends, which the next launch on its stream waits for; the partial sums' memory is given to
    nobody else before, since PyTorch hands it out again in the order of that stream alone.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def weighted(kd_value, label_value, kd_weight, label_weight, WITH_KD: tl.constexpr, WITH_LABEL: tl.constexpr):
    """The loss of its two terms; one without weight may be infinite, and is left out."""
    if WITH_KD and WITH_LABEL:
        return kd_weight * kd_value + label_weight * label_value
    elif WITH_KD:
        return kd_weight * kd_value
    elif WITH_LABEL:
        return label_weight * label_value
    else:
        return tl.zeros_like(kd_value)


@triton.jit
def store_reduced(
    partials, loss, kd, label, programs, kd_weight, label_weight,
    WITH_KD: tl.constexpr, WITH_LABEL: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and terms from the programs' sums, partials[2, programs], and what they are divided by, the number that follows."""
    count = tl.load(partials + 2 * programs, cache_modifier=".cg")
    kd_value = divide(total_of(partials, programs, BLOCK, ACC), count, ACC)
    label_value = divide(total_of(partials + programs, programs, BLOCK, ACC), count, ACC)
    tl.store(kd, kd_value)
    tl.store(label, label_value)
    tl.store(loss, weighted(kd_value, label_value, kd_weight, label_weight, WITH_KD, WITH_LABEL))


@triton.jit
def half_scale(bound):
    """For an fp16 gradient below `bound`: the power of two it is stored times, and that power's inverse.

    With bound < 2^(e - 126), e its biased exponent, bound * 2^(141 - e) stays below 2^15; fp16 ends at 65504.
    """
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 15), 253)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return up, down
