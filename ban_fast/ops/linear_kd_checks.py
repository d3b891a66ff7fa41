"""Arguments of `fused_linear_kd`, checked before anything is computed."""

import torch
from torch import Tensor

from ban_fast.ops.checks import DTYPES, check_layout


def check_layer(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states [..., H], weight [V, H] and bias [V] or None of "student" or "teacher", V and H at least 1."""
    named = {f"{whose}_hidden": hidden, f"{whose}_weight": weight}
    if bias is not None:
        named[f"{whose}_bias"] = bias
    for name, tensor in named.items():
        check_floats(name, tensor, f"{whose}_hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{whose}_hidden: shape {list(hidden.shape)} has no features; [..., H] is needed")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{whose}_weight: shape {list(weight.shape)} is not [V, {hidden.shape[-1]}], "
            f"as {whose}_hidden {list(hidden.shape)} needs it"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{whose}_bias: shape {list(bias.shape)} is not [{weight.shape[0]}], one for each logit")


def check_floats(name: str, tensor: Tensor, beside: str, other: Tensor) -> None:
    """A tensor of one of the four dtypes, on the device of `other`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: a {type(tensor).__name__} was given, not a tensor")
    check_layout(name, tensor)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not float32, float16, bfloat16 or float64")
    if tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, and {beside} is on {other.device}")


def check_labels(labels: Tensor | None, hidden: Tensor, label_weight: float) -> None:
    """int64, one for each row of hidden states; not to be left out where they have a weight."""
    if labels is None:
        if label_weight > 0:
            raise ValueError(f"labels: None was given, and label_weight is {label_weight}")
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = f"a {labels.dtype} tensor" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(f"labels: {kind} was given; an int64 tensor is needed")
    check_layout("labels", labels)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: shape {list(labels.shape)} is not {list(hidden.shape[:-1])}, "
            f"one for each row of student_hidden {list(hidden.shape)}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels: on {labels.device}, and student_hidden is on {hidden.device}")


def check_label_range(labels: Tensor, ignore_index: int, classes: int) -> None:  # [R] on the CPU
    """ValueError that names the first label out of range, the row counted over all chunks."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels: {int(labels[row])} in row {row} is out of range for {classes} classes "
            f"(ignore_index is {ignore_index})"
        )


def check_teacher(
    student_hidden: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    logits: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Logits [..., V], or hidden states [..., H'] with a weight [V, H'] and perhaps a bias [V]: either, not both."""
    rows, classes = student_hidden.shape[:-1], student_weight.shape[0]
    if logits is not None:
        for name, tensor in (("teacher_hidden", hidden), ("teacher_weight", weight), ("teacher_bias", bias)):
            if tensor is not None:
                raise ValueError(f"{name}: given beside teacher_logits; one of the two is the teacher")
        check_floats("teacher_logits", logits, "student_hidden", student_hidden)
        if logits.shape != (*rows, classes):
            raise ValueError(f"teacher_logits: shape {list(logits.shape)} is not {[*rows, classes]}")
        return
    if hidden is None:
        raise ValueError("teacher_logits: None was given, and teacher_hidden is None too; one of them is needed")
    if weight is None:
        raise ValueError("teacher_weight: None was given, and teacher_hidden needs it")
    check_floats("teacher_hidden", hidden, "student_hidden", student_hidden)
    check_layer("teacher", hidden, weight, bias)
    if hidden.shape[:-1] != rows:
        raise ValueError(
            f"teacher_hidden: shape {list(hidden.shape)} is not {[*rows, hidden.shape[-1]]}: "
            f"its rows are student_hidden's {list(student_hidden.shape)}"
        )
    if weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight: shape {list(weight.shape)} has {weight.shape[0]} outputs, and student_weight {classes}; "
            "both need one vocabulary"
        )
