"""From a backend's one pass, loss and gradient together, to a loss that autograd can call back.

Eager mode calls the backend directly, and hands its gradient out after scaling it in place, so it can be handed out
once. Traced code (compile, export, fake tensors) calls the operator, and scales into a new tensor by an operator of its
own: there the compiler decides what may be reused.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ban_fast.backends import dispatch
from ban_fast.backends.interface import Backend, LossOutput, Usual, acc_dtype
from ban_fast.ops.checks import DTYPES

Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A LossOutput as an operator returns it: tensors only, shape [0] for None."""
Result = Tensor | tuple[Tensor, dict[str, Tensor]]
"""A loss, or with return_terms a loss and its terms."""
_OWN = (Tensor, torch.nn.Parameter)
"""torch's own kinds of tensor."""


def evaluate(
    name: str,
    student_logits: Tensor,  # [..., C]
    inputs: tuple[Tensor | int | None, ...],  # the operator's other positional arguments, over rows
    *,
    backend: str,
    return_terms: bool,
    **options: Any,
) -> Result:
    """The loss that operator and backend function `name` compute, with its gradient behind it."""
    has_rows = student_logits.dim() == 2
    student = student_logits if has_rows else flat(student_logits)
    need_grad = student_logits.requires_grad and torch.is_grad_enabled()
    refuse_forward_mode(student_logits)
    if is_traced(student_logits, inputs):
        dispatch.check_name(backend)
        loss, kd, label = _evaluate_traced(name, student, inputs, need_grad, backend, options)
    else:
        chosen = dispatch.resolve(backend, name, student)
        held = [in_memory(value) if isinstance(value, Tensor) else value for value in (student, *inputs)]
        try:
            output = getattr(chosen, name)(*held, need_grad=need_grad, need_terms=return_terms, **options)
            loss, kd, label, grad, grad_scale = output
            if need_grad:
                loss = _Stored.apply(student_logits, (loss, grad, grad_scale), chosen, backend)
        except RuntimeError as error:
            explain(error, held)
            raise
    if not has_rows:
        loss = _shaped(loss, student_logits)
    if not return_terms:
        return loss
    return loss, {"kd": _shaped(kd, student_logits), "label": _shaped(label, student_logits)}


def usual(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    teacher_rows: Tensor | None,
    backend: str,
    *options: Any,  # as `Backend.usual_kd` has them
) -> Tensor | None:
    """The KD loss by the backend's way for usual calls; None where it has none, or the call is not usual.

    Nothing need be checked before, and with None nothing has been computed: the usual way, 6 us shorter, has neither
    messages nor rare cases. On CPUs alone: elsewhere no backend has one, and asking for it would cost 0.8 us.
    """
    if is_traced(student_logits) or not student_logits.is_cpu or forward_ad._current_level >= 0:
        return None
    if student_logits.dim() != 2 or student_logits.dtype not in DTYPES:  # what no backend can be chosen for
        return None
    if student_logits.is_neg() or (isinstance(teacher_logits, Tensor) and teacher_logits.is_neg()):
        return None  # a view that only says that its memory is to be negated
    chosen = dispatch.resolve(backend, "kd", student_logits)
    usual_kd = getattr(chosen, "usual_kd", None)
    if usual_kd is None:
        return None
    need_grad = student_logits.requires_grad and torch.is_grad_enabled()
    output: Usual | None = usual_kd(
        student_logits, teacher_logits, labels, teacher_rows, *options, need_grad, torch.get_num_threads()
    )
    if output is None:
        return None
    loss: Tensor = _Stored.apply(student_logits, output, chosen, backend) if need_grad else output[0]
    return loss


def flat(logits: Tensor) -> Tensor:
    """Logits [..., C] as rows [R, C]: a view where strides allow one."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def flat_rows(values: Tensor | None) -> Tensor | None:
    """One value a row, [...], as [R]."""
    return values if values is None or values.dim() == 1 else values.reshape(-1)


def _shaped(value: Tensor, logits: Tensor) -> Tensor:
    """A loss or term of reduction "none", [R], in the labels' shape; a 0-d one as it is."""
    return value if value.dim() == 0 else value.reshape(logits.shape[:-1])


def as_operand(value: Tensor | int, logits: Tensor) -> Tensor:
    """`value` as the int64 tensor an operator takes; an int becomes a 0-d tensor on the logits' device."""
    return value if isinstance(value, Tensor) else logits.new_full((), value, dtype=torch.int64)


def is_traced(logits: Tensor, others: tuple[object, ...] = ()) -> bool:
    """Whether a call must go through the dispatcher; in plain eager mode that would cost a third of a small loss.

    So it is under torch.compile, with tensors of other kinds than torch's own, whose memory need not be what they mean,
    and wherever a mode (fake tensors, make_fx) is to see every operator.
    """
    if (
        torch.compiler.is_compiling()
        or type(logits) not in _OWN
        or torch._is_functional_tensor(logits)
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for value in others:  # noqa: SIM110 -- any() would cost a small loss another 0.4 us
        if isinstance(value, Tensor) and type(value) not in _OWN:
            return True
    return False


def in_memory(value: Tensor) -> Tensor:
    """A tensor whose memory says what it means, as backends read it: some only say that they are negated, or all 0."""
    return value.clone() if value.is_neg() or value._is_zerotensor() else value


def explain(error: RuntimeError, inputs: Iterable[object]) -> None:
    """RuntimeError that says why, where a backend could not read the wrappers that torch.func makes of tensors."""
    kinds = torch._C._functorch
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if any(kinds.is_functorch_wrapped_tensor(tensor) or kinds.is_legacy_batchedtensor(tensor) for tensor in tensors):
        raise RuntimeError(
            "a ban_fast loss cannot be computed within a transform of torch.func (vmap, grad, ...) or on batched "
            "gradients: give a batch as leading dimensions [..., C], and call backward or torch.autograd.grad"
        ) from error


def refuse_forward_mode(logits: Tensor, what: str = "a ban_fast loss") -> None:
    """RuntimeError if `logits` carry a forward-mode tangent: the losses have no such derivative; `what` names one."""
    if forward_ad._current_level < 0:  # as everywhere but in forward mode; asking the tensor would cost 0.3 us
        return
    if forward_ad.unpack_dual(logits).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(f"{what} has no forward-mode derivative: call backward or torch.autograd.grad")


class _Stored(torch.autograd.Function):
    """d loss / d student as forward left it, given away by backward after one scaling in place."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, output: Usual, backend: Backend, name: str) -> Tensor:
        loss, grad, grad_scale = output  # in a tuple: a loss that is an input itself would come out as a view of it
        ctx.stored = grad, grad_scale, backend, name, student.shape
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_create_graph()
        if ctx.stored is None:
            raise RuntimeError(
                "a second backward through one ban_fast loss: the first scaled its stored gradient in place and gave "
                "it away. Compute the loss again, or add up all that depends on it and call backward once"
            )
        grad, grad_scale, backend, name, shape = ctx.stored
        ctx.stored = None
        if is_traced(grad_outputs[0]):  # compiled autograd: an eager forward may have a traced backward
            grad_scale = grad_outputs[0].new_empty(0) if grad_scale is None else grad_scale
            scaled = torch.ops.ban_fast.scale_grad(grad, grad_outputs[0], grad_scale, name)
        else:
            grad_output = in_memory(grad_outputs[0])
            try:
                scaled = backend.scale_grad_(grad, grad_output, grad_scale)
            except RuntimeError as error:
                explain(error, [grad_output])
                raise
        # A view of what has the shape already would cost a small loss 1.3 of its 40 us.
        return scaled if len(shape) == 2 else scaled.view(shape), None, None, None


def refuse_create_graph() -> None:
    """RuntimeError in a backward that is asked for a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError("a ban_fast loss has no second derivative: call backward without create_graph=True")


def _evaluate_traced(
    name: str,
    student: Tensor,  # [R, C]
    inputs: tuple[Tensor | int | None, ...],
    need_grad: bool,
    backend: str,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    detached = [None if value is None else as_operand(value, student).detach() for value in inputs]
    operator = getattr(torch.ops.ban_fast, name)
    loss, kd, label, grad, grad_scale = operator(
        student.detach(), *detached, need_grad=need_grad, backend=backend, **options
    )
    if need_grad:
        loss = _Traced.apply(student, loss, grad, grad_scale, backend)
    return loss, kd, label


class _Traced(torch.autograd.Function):
    """The same as a graph of pure operators."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Tensor, grad: Tensor, grad_scale: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(grad, grad_scale)
        ctx.backend = backend
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        if not torch.compiler.is_compiling():  # compiled backwards refuse on their own
            refuse_create_graph()
        grad, grad_scale = ctx.saved_tensors
        return torch.ops.ban_fast.scale_grad(grad, grad_outputs[0], grad_scale, ctx.backend), None, None, None, None


torch.library.define(
    "ban_fast::scale_grad",
    "(Tensor grad, Tensor grad_output, Tensor grad_scale, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ban_fast::scale_grad", "default")
def _scale_grad(grad: Tensor, grad_output: Tensor, grad_scale: Tensor, backend: str) -> Tensor:
    acc = acc_dtype(grad.dtype)
    if grad_output.shape not in ((), grad.shape[:1]) or grad_output.dtype != acc:
        raise ValueError(
            f"grad_output: a {grad_output.dtype} tensor of shape {list(grad_output.shape)} was given; "
            f"a {acc} one of shape [] or {list(grad.shape[:1])} is needed"
        )
    scale = grad_scale if grad_scale.dim() == 0 else None
    scaled = grad.clone(memory_format=torch.contiguous_format)
    return dispatch.resolve(backend, "kd", grad).scale_grad_(scaled, grad_output, scale)


def _scale_grad_fake(grad: Tensor, grad_output: Tensor, grad_scale: Tensor, backend: str) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


torch.library.register_fake("ban_fast::scale_grad", _scale_grad_fake)


def pack(output: LossOutput) -> Packed:
    """What an operator returns for a backend's output."""
    empty = output.loss.new_empty
    return (
        output.loss,
        output.kd,
        output.label,
        empty(0) if output.grad is None else output.grad,
        empty(0) if output.grad_scale is None else output.grad_scale,
    )


def packed_fake(student: Tensor, reduction: str, need_grad: bool) -> Packed:
    """The shapes and dtypes of `pack`'s result for a student [R, C]."""
    acc = acc_dtype(student.dtype)
    shape = (student.shape[0],) if reduction == "none" else ()
    loss, kd, label = (student.new_empty(shape, dtype=acc) for _ in range(3))
    grad = student.new_empty(student.shape) if need_grad else student.new_empty(0, dtype=acc)
    scaled = need_grad and student.dtype == torch.float16
    return loss, kd, label, grad, student.new_empty(() if scaled else 0, dtype=acc)
