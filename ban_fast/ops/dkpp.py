"""Dark knowledge with permuted predictions (eq 11 of Born-Again Neural Networks) as an operator, and its targets."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.backends.interface import Divergence, Reduction, acc_dtype
from ban_fast.ops import checks
from ban_fast.ops.autograd import (
    Packed,
    Result,
    as_operand,
    evaluate,
    explain,
    flat,
    flat_rows,
    in_memory,
    is_traced,
    pack,
    packed_fake,
)

torch.library.define(
    "ban_fast::dkpp",
    "(Tensor student, Tensor teacher, Tensor? labels, Tensor? sample_ids, Tensor step, Tensor? teacher_rows, *, "
    "int seed, float temperature, float kd_weight, float label_weight, str divergence, bool scale_t2, "
    "int ignore_index, str reduction, bool need_grad, str backend)"
    " -> (Tensor loss, Tensor kd, Tensor label, Tensor grad, Tensor grad_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ban_fast::dkpp_targets",
    "(Tensor teacher, Tensor? sample_ids, Tensor step, Tensor? teacher_rows, *, int seed, float temperature, "
    "str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ban_fast::dkpp", "default")
def _dkpp(
    student: Tensor,  # [R, C]
    teacher: Tensor,  # [M, C]
    labels: Tensor | None,  # [R]
    sample_ids: Tensor | None,  # [R]
    step: Tensor,  # 0-d
    teacher_rows: Tensor | None,  # [R]
    *,
    backend: str,
    **options: Any,
) -> Packed:
    checks.check_operands(student, teacher, labels, sample_ids, teacher_rows)
    checks.check_step(step, student)
    chosen = dispatch.resolve(backend, "dkpp", student)
    return pack(chosen.dkpp(student, teacher, labels, sample_ids, step, teacher_rows, **options))


def _dkpp_fake(student: Tensor, *inputs: Tensor | None, reduction: str, need_grad: bool, **options: Any) -> Packed:
    return packed_fake(student, reduction, need_grad)


torch.library.register_fake("ban_fast::dkpp", _dkpp_fake)


@torch.library.impl("ban_fast::dkpp_targets", "default")
def _dkpp_targets(
    teacher: Tensor,  # [M, C]
    sample_ids: Tensor | None,  # [R]
    step: Tensor,  # 0-d
    teacher_rows: Tensor | None,  # [R]
    *,
    backend: str,
    **options: Any,
) -> Tensor:
    checks.check_logits("teacher_logits", teacher)
    checks.check_targets(teacher, sample_ids, teacher_rows)
    checks.check_step(step, teacher)
    return dispatch.resolve(backend, "dkpp", teacher).dkpp_targets(teacher, sample_ids, step, teacher_rows, **options)


def _dkpp_targets_fake(
    teacher: Tensor, sample_ids: Tensor | None, step: Tensor, teacher_rows: Tensor | None, **options: Any
) -> Tensor:
    rows = teacher.shape[0] if teacher_rows is None else teacher_rows.shape[0]
    return teacher.new_empty((rows, teacher.shape[1]), dtype=acc_dtype(teacher.dtype))


torch.library.register_fake("ban_fast::dkpp_targets", _dkpp_targets_fake)


@overload
def dkpp_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    step: Tensor | int = 0,
    sample_ids: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def dkpp_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    step: Tensor | int = 0,
    sample_ids: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    return_terms: Literal[False] = False,
) -> Tensor: ...


def dkpp_loss(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor,  # [..., C], or [M, C] with teacher_rows
    labels: Tensor | None = None,  # [...] int64
    *,
    temperature: float = 1.0,
    seed: int = 0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    divergence: Divergence = "kl",
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
    step: Tensor | int = 0,  # int, or 0-d int64
    sample_ids: Tensor | None = None,  # [...] int64; None: 0..rows-1
    teacher_rows: Tensor | None = None,  # [...] int64 into M
    return_terms: bool = False,
) -> Result:
    """`kd_loss` against the teacher's distribution with every output but its argmax permuted: see `DKPPLoss`.

    Returns as `kd_loss` does, and raises as it does.
    """
    checks.check_kd_options(temperature, kd_weight, label_weight, divergence, scale_t2, ignore_index, reduction)
    checks.check_int("seed", seed)
    checks.check_logits("student_logits", student_logits)
    checks.check_teacher(student_logits, teacher_logits, teacher_rows)
    checks.check_labels(labels, student_logits, label_weight)
    if sample_ids is not None:
        checks.check_rows("sample_ids", sample_ids, student_logits)
    checks.check_step(step, student_logits)
    inputs = (flat(teacher_logits), flat_rows(labels), flat_rows(sample_ids), step, flat_rows(teacher_rows))
    return evaluate(
        "dkpp",
        student_logits,
        inputs,
        backend=backend,
        return_terms=return_terms,
        seed=seed,
        temperature=temperature,
        kd_weight=kd_weight,
        label_weight=label_weight,
        divergence=divergence,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def dkpp_targets(
    teacher_logits: Tensor,  # [..., C], or [M, C] with teacher_rows
    *,
    temperature: float = 1.0,
    seed: int = 0,
    step: Tensor | int = 0,  # int, or 0-d int64
    sample_ids: Tensor | None = None,  # [...] int64; None: 0..rows-1
    teacher_rows: Tensor | None = None,  # [...] int64 into M
    backend: str = "auto",
) -> Tensor:
    """The distributions that `dkpp_loss` distils from, [..., C] fp32 (fp64 for fp64 teachers); no graph behind them.

    Each is softmax(teacher / temperature) with every output but its argmax (the lowest index on fp32 logits) permuted
    by a bijection that depends on (seed, step, sample id) alone. Arguments as in `DKPPLoss`.
    Raises ValueError that names the argument and the value received.
    """
    checks.check_temperature(temperature)
    checks.check_int("seed", seed)
    checks.check_logits("teacher_logits", teacher_logits)
    shape = checks.check_targets(teacher_logits, sample_ids, teacher_rows)
    checks.check_step(step, teacher_logits)
    teacher, ids, rows = flat(teacher_logits).detach(), flat_rows(sample_ids), flat_rows(teacher_rows)
    if is_traced(teacher, (ids, step, rows)):
        dispatch.check_name(backend)
        targets: Tensor = torch.ops.ban_fast.dkpp_targets(
            teacher, ids, as_operand(step, teacher), rows, seed=seed, temperature=temperature, backend=backend
        )
    else:
        chosen = dispatch.resolve(backend, "dkpp", teacher)
        inputs: list[Any] = [
            in_memory(value) if isinstance(value, Tensor) else value for value in (teacher, ids, step, rows)
        ]
        try:
            targets = chosen.dkpp_targets(*inputs, seed=seed, temperature=temperature)
        except RuntimeError as error:
            explain(error, inputs)
            raise
    return targets.view(shape)
