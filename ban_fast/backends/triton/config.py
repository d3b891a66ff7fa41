"""Block sizes and warps by shape: one small table, no tuning at run time.

`tests/backends/triton` compiles what it yields for sm_80 and sm_90 and fails on a spilled register.
"""

from typing import Any, NamedTuple

JIT: dict[str, Any] = {
    "do_not_specialize": [
        *("num_rows", "num_teacher_rows", "num_classes", "num_counts", "num_totals", "programs", "row_length"),
        *("student_row", "student_col", "teacher_row", "teacher_col", "ignore_index"),
        *("temperature", "inverse", "exp_scale", "kd_scale", "kd_slope", "kd_weight", "label_weight"),
        *("prefix_0", "prefix_1", "feistel_a", "feistel_b", "reciprocal"),
    ],
    "do_not_specialize_on_alignment": [
        *("labels", "teacher_rows", "sample_ids", "step", "argmax", "confidence", "normalizer", "grad_output"),
        *("loss", "kd", "label", "grad_scale", "partials", "counter", "counts", "totals"),
    ],
}
"""Of every kernel: arguments that it is not compiled anew for, when they happen to be 1 or divisible by 16. What matters of
those kernels are told as ALIGN. A step, as part of DKPP's key, would otherwise compile four times in a training run."""

MAX_PROGRAMS = 4096
"""Programs of a launch; each takes rows in turn. The last one adds up what all have left, so they are bounded."""
TOTAL_PROGRAMS = 128
"""Programs that count kept rows, or add up confidences, for a batch too large for every program to do so itself."""
COUNTED_BELOW = 512
"""Rows a warp up to which every program counts the kept rows itself, from the cache, and a launch is saved; 4 warps at most."""
RANKED_BELOW = 128
"""Classes up to which DKPP permutes in registers; above, it writes permuted rows to a scratch that stays in the L2 cache."""
PREFETCH_SHARED = 120_000
"""Bytes of shared memory that `Plan.stages` 2 may need with 16 warps; a GPU whose programs have less does without."""
_LANES = {(True, False): 20, (True, True): 16, (False, False): 8, (False, True): 8}
"""By (aligned, permuted): lanes for which a thread has room in 128 registers, at two fp32 values each and their addresses."""
_LANES_DOUBLE = 8


class Plan(NamedTuple):
    """A program's share of the rows: `rows` of them at a time, `parts` times `block` lanes each, by `warps` warps."""

    rows: int
    block: int
    parts: int
    warps: int
    online: bool = False
    """One row at a time, in as many blocks as it takes, twice."""
    resident: int = 0
    """Programs a multiprocessor holds, and no more are launched; 0: as many as there are tiles, up to MAX_PROGRAMS."""
    stages: int = 1
    """2: the next row is on its way while one is in work, which a lone resident program would otherwise wait for."""

    def programs(self, num_rows: int, multiprocessors: int) -> int:
        limit = self.resident * multiprocessors or MAX_PROGRAMS
        return min(-(-num_rows // self.rows), limit)

    @property
    def total_block(self) -> int:
        """Rows, or partial sums, that one step of a total adds: 4 a thread."""
        return 128 * self.warps

    @property
    def counted_below(self) -> int:
        return COUNTED_BELOW * min(self.warps, 4)

    def options(self, *, double: bool) -> dict[str, Any]:
        """Launch options. 128 registers a thread are 16 warps a multiprocessor; unbounded, ptxas takes more, or spills."""
        return {"num_warps": self.warps, "maxnreg": 255 if double else 128}


_SMALL = (
    (16, Plan(16, 16, 1, 4)),
    (32, Plan(8, 32, 1, 4)),
    (64, Plan(2, 64, 1, 1)),
    (128, Plan(1, 128, 1, 1)),
    (256, Plan(1, 256, 1, 1)),
    (512, Plan(1, 512, 1, 2)),
    (1024, Plan(1, 1024, 1, 4)),
)
"""(classes up to, plan). A row of up to 256 classes lies in one warp, whatever its alignment: no barriers."""


def distill_plan(num_classes: int, *, aligned: bool, double: bool, permuted: bool) -> Plan:
    """How KD and DKPP go through rows of this many classes; `aligned` is whether a thread can load four at once."""
    scratch = permuted and num_classes > RANKED_BELOW
    for limit, plan in _SMALL:
        if num_classes <= limit:
            return plan._replace(resident=16 // plan.warps) if scratch else plan
    for warps in (4, 8) if double else (4, 8, 16):
        lanes = _LANES_DOUBLE if double else _LANES[aligned, permuted and warps < 16]
        if num_classes <= 32 * warps * lanes:
            block = 128 * warps
            alone = warps == 16 and not permuted
            resident = 16 // warps if permuted or alone else 0
            return Plan(1, block, -(-num_classes // block), warps, resident=resident, stages=2 if alone else 1)
    return Plan(1, 2048 if aligned and not double else 1024, 1, 8, online=True, resident=2 if permuted else 0, stages=2)


def cross_entropy_plan(num_classes: int, *, aligned: bool, double: bool) -> Plan:
    """How CWTM goes through the student's rows: as `distill_plan`, with one value a lane in place of two."""
    for limit, plan in _SMALL:
        if num_classes <= limit:
            return plan
    for warps in (4, 8) if double else (4, 8, 16):
        if num_classes <= 32 * warps * (32 if aligned and not double else 16):
            block = 128 * warps
            return Plan(1, block, -(-num_classes // block), warps)
    return Plan(1, 2048 if not double else 1024, 1, 8, online=True, stages=2)


def blocks_plan(num_classes: int) -> Plan:
    """How rows of any length are read in blocks: the teacher's confidences, and DKPP's targets."""
    for limit, plan in _SMALL:
        if num_classes <= limit:
            return plan._replace(resident=16 // plan.warps)
    return Plan(1, 2048, 1, 8, online=True, resident=2, stages=2)
