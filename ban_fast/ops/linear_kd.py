"""Knowledge distillation from hidden states, the logits of a chunk at a time (`linear_kd_chunks` computes).

Gradients are summed in forward, as the chunks pass. Reduction "none" cannot: what its rows are multiplied by comes with
backward, which goes through the chunks once more.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ban_fast.backends.interface import Reduction, acc_dtype
from ban_fast.ops import checks
from ban_fast.ops.autocast import autocast_dtype
from ban_fast.ops.autograd import (
    Result,
    flat,
    flat_rows,
    in_memory,
    is_traced,
    refuse_create_graph,
    refuse_forward_mode,
)
from ban_fast.ops.linear_kd_checks import check_label_range, check_labels, check_layer, check_teacher
from ban_fast.ops.linear_kd_chunks import Layer, Need, Task, layer, run

Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, KD term, label term, then the gradients of hidden states, weight and bias, shape [0] where nobody needs them,
and the 0-d factor that they still lack."""


class Inputs(NamedTuple):
    """The operator's tensors, over rows."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor | None  # [R]
    teacher: Tensor  # [R, V] logits, or [R, H'] hidden states where there is a teacher_weight
    teacher_weight: Tensor | None  # [V, H']
    teacher_bias: Tensor | None  # [V]


torch.library.define(
    "ban_fast::linear_kd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor teacher, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? row_weights, *, float temperature, float kd_weight, float label_weight, "
    "bool scale_t2, int ignore_index, str reduction, int? chunk_bytes, ScalarType? autocast, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor loss, Tensor kd, Tensor label, Tensor grad_hidden, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ban_fast::linear_kd", "default")
def _linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weights: Tensor | None,  # [R]
    *,
    reduction: Reduction,
    chunk_bytes: int | None,
    autocast: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> Packed:
    hidden, weight, teacher = in_memory(hidden), in_memory(weight), in_memory(teacher)
    bias, labels, teacher_weight, teacher_bias = (
        None if tensor is None else in_memory(tensor) for tensor in (bias, labels, teacher_weight, teacher_bias)
    )
    if labels is not None and labels.device.type == "cpu":
        check_label_range(labels, options["ignore_index"], weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        teacher_layer: Layer | None = None
        if teacher_weight is not None:
            teacher_layer = layer(teacher_weight, teacher_bias, teacher, autocast)
        task = Task(hidden, layer(weight, bias, hidden, autocast), teacher, teacher_layer, labels, **options)
        need = Need(need_hidden, need_weight, need_bias)
        loss, kd, label, sums = run(task, reduction, row_weights, need, chunk_bytes)
    empty = loss.new_empty
    grads = [empty(0) if grad is None else grad for grad in (sums.hidden, sums.weight, sums.bias)]
    return loss, kd, label, grads[0], grads[1], grads[2], sums.scale


def _linear_kd_fake(
    hidden: Tensor,
    weight: Tensor,
    *inputs: Tensor | None,
    reduction: str,
    autocast: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> Packed:
    acc = acc_dtype(autocast or torch.promote_types(hidden.dtype, weight.dtype))
    loss, kd, label = (hidden.new_empty(hidden.shape[:1] if reduction == "none" else (), dtype=acc) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=acc)
    grad_weight = hidden.new_empty(weight.shape if need_weight else (0,), dtype=acc)
    grad_bias = hidden.new_empty(weight.shape[:1] if need_bias else (0,), dtype=acc)
    return loss, kd, label, grad_hidden, grad_weight, grad_bias, hidden.new_empty((), dtype=acc)


torch.library.register_fake("ban_fast::linear_kd", _linear_kd_fake)


class _Stored(torch.autograd.Function):
    """Gradients as forward summed them, given away by backward after one scaling."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.stored = packed[3:]
        return packed[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        if ctx.stored is None:
            raise RuntimeError(
                "a second backward through one ban_fast loss: the first scaled its stored gradients in place and gave "
                "them away. Compute the loss again, or add up all that depends on it and call backward once"
            )
        *grads, scale = ctx.stored
        ctx.stored = None
        in_place = not is_traced(grad_outputs[0])
        factor = grad_outputs[0] * scale
        needed = zip(ctx.needs_input_grad, grads, ctx.dtypes, strict=False)
        return *(_scaled(grad, factor, dtype, in_place) if need else None for need, grad, dtype in needed), None


class _Traced(torch.autograd.Function):
    """The same as a graph of pure operators."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        grad_hidden: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        grad_scale: Tensor,
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_scale)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():  # compiled backwards refuse on their own
            refuse_create_graph()
        *grads, scale = ctx.saved_tensors
        factor = grad_outputs[0] * scale
        needed = zip(ctx.needs_input_grad, grads, ctx.dtypes, strict=False)
        return *(_scaled(grad, factor, dtype, False) if need else None for need, grad, dtype in needed), *[None] * 5


class _EachRow(torch.autograd.Function):
    """Reduction "none": gradients of rows as backward weighs them, from inputs that autograd knows to be unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        options: dict[str, Any],
        *others: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *others)
        ctx.options = options
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            refuse_create_graph()
        need = Need(*ctx.needs_input_grad[:3])
        saved = ctx.saved_tensors
        packed = _call(Inputs(*saved), grad_outputs[0], need, reduction="sum", **ctx.options)
        return (
            *(
                _scaled(grad, packed[6], student.dtype, True) if wanted else None
                for wanted, grad, student in zip(need, packed[3:6], saved[:3], strict=True)
            ),
            *[None] * 6,
        )


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """grad * factor, in its owner's dtype."""
    return (grad.mul_(factor) if in_place else grad * factor).to(dtype)


def _checkable(tensor: Tensor | None) -> Tensor | None:
    """A tensor that nobody differentiates, for autograd to keep; of one from inference mode, which has no version by
    which a change would be seen, a copy."""
    if tensor is None:
        return None
    is_unversioned = not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if is_unversioned else tensor.detach()  # of one version with the tensor


def _call(inputs: Inputs, row_weights: Tensor | None, need: Need, **options: Any) -> Packed:
    detached = [None if tensor is None else tensor.detach() for tensor in (*inputs, row_weights)]
    packed: Packed = torch.ops.ban_fast.linear_kd(
        *detached, need_hidden=need.hidden, need_weight=need.weight, need_bias=need.bias, **options
    )
    return packed


def _evaluate(inputs: Inputs, reduction: Reduction, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with the graph behind it, and its terms."""
    hidden, weight, bias, *others = inputs
    students = hidden, weight, bias
    for student in students:
        if student is not None:
            refuse_forward_mode(student)
    need = Need(*(t is not None and t.requires_grad and torch.is_grad_enabled() for t in students))
    if reduction == "none":
        packed = _call(inputs, None, Need(False, False, False), reduction=reduction, **options)
        loss = packed[0]
        if any(need):
            loss = _EachRow.apply(*students, loss, options, *map(_checkable, others))
        return loss, packed[1], packed[2]
    packed = _call(inputs, None, need, reduction=reduction, **options)
    loss = packed[0]
    if any(need) and is_traced(hidden, inputs[1:]):
        loss = _Traced.apply(*students, loss, *packed[3:])
    elif any(need):
        loss = _Stored.apply(*students, packed)
    return loss, packed[1], packed[2]


@overload
def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_bytes: int | None = None,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_bytes: int | None = None,
    return_terms: Literal[False] = False,
) -> Tensor: ...


def fused_linear_kd(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    labels: Tensor | None = None,  # [...] int64
    *,
    teacher_logits: Tensor | None = None,  # [..., V]
    teacher_hidden: Tensor | None = None,  # [..., H']
    teacher_weight: Tensor | None = None,  # [V, H']
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_bytes: int | None = None,
    return_terms: bool = False,
) -> Result:
    """`kd_loss` of F.linear(student_hidden, student_weight, student_bias), whose logits are never all there at once.

    For language models: next to the logits of [35 x 32, 10000] everything else is small. Hidden states, weight and bias
    get their gradients (a weight tied to an embedding adds it to the embedding's), the teacher none. Logits and sums
    are fp32 whatever the inputs are (fp64 for fp64), so a bf16 student close to its teacher keeps the gradient that
    rounding its logits to bf16 would drown. Under autocast the operands are rounded to its dtype, as F.linear's are.

    Args:
        student_hidden: fp32, fp16, bf16 or fp64, any strides; the weight's dtype or another.
        labels, temperature, kd_weight, label_weight, scale_t2, ignore_index, reduction: as in `KDLoss`.
        teacher_logits: the teacher's outputs, or instead of them
        teacher_hidden, teacher_weight, teacher_bias: its last hidden states and output layer; H' may differ from H.
        chunk_bytes: budget for the logits that are there at once: the student's, their gradient, and the teacher's if
            they come from hidden states; on a CPU the gradient takes the place of the student's. One row is the least.
            None: 5 MiB on a CPU, 1 GiB on a GPU.
        return_terms: also return {"kd": ..., "label": ...}, as `kd_loss` does.

    The loss is fp32 (fp64 for fp64 students), 0-d, or [...] for reduction "none", whose backward goes through the
    chunks a second time. Raises ValueError that names the argument and the value received.
    """
    checks.check_kd_options(temperature, kd_weight, label_weight, "kl", scale_t2, ignore_index, reduction)
    checks.check_flag("return_terms", return_terms)
    if chunk_bytes is not None and (type(chunk_bytes) is not int or not 1 <= chunk_bytes < 1 << 63):
        raise ValueError(f"chunk_bytes: {chunk_bytes!r} is not a whole number from 1 up to 2^63 - 1, nor None")
    check_layer("student", student_hidden, student_weight, student_bias)
    check_labels(labels, student_hidden, label_weight)
    check_teacher(student_hidden, student_weight, teacher_logits, teacher_hidden, teacher_weight, teacher_bias)
    teacher = teacher_hidden if teacher_logits is None else teacher_logits
    assert teacher is not None
    loss, kd, label = _evaluate(
        Inputs(
            flat(student_hidden),
            student_weight,
            student_bias,
            flat_rows(labels),
            flat(teacher),
            teacher_weight,
            teacher_bias,
        ),
        reduction,
        temperature=temperature,
        kd_weight=kd_weight,
        label_weight=label_weight,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        autocast=autocast_dtype(student_hidden.device.type),
    )
    if reduction == "none":
        loss, kd, label = (value.reshape(student_hidden.shape[:-1]) for value in (loss, kd, label))
    return (loss, {"kd": kd, "label": label}) if return_terms else loss
