"""Wrong arguments of fused_linear_kd: a ValueError that names the argument and what it was."""

import inspect
from typing import Any

import pytest
import torch

from ban_fast.losses import fused_linear_kd

H, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, 5)
HT, WT = torch.zeros(4, 2), torch.zeros(5, 2)
Y = torch.zeros(4, dtype=torch.int64)
META = torch.device("meta")
HIDDEN_TEACHER = {"teacher_logits": None, "teacher_hidden": HT, "teacher_weight": WT}

CALLS: list[tuple[dict[str, Any], str]] = [
    ({"student_hidden": [[1.0]]}, "student_hidden: a list was given, not a tensor"),
    ({"student_hidden": H.int()}, "student_hidden: dtype torch.int32 is not float32"),
    ({"student_hidden": H.to_sparse()}, "student_hidden: a tensor of layout torch.sparse_coo was given"),
    ({"student_hidden": H.to(torch.complex64)}, "student_hidden: dtype torch.complex64 is not float32"),
    ({"student_hidden": torch.tensor(1.0)}, r"student_hidden: shape \[\] has no features"),
    ({"student_hidden": torch.zeros(4, 0)}, r"student_hidden: shape \[4, 0\] has no features"),
    ({"student_weight": None}, "student_weight: a NoneType was given"),
    (
        {"student_weight": torch.zeros(5, 4)},
        r"student_weight: shape \[5, 4\] is not \[V, 3\], as student_hidden \[4, 3\]",
    ),
    ({"student_weight": W.to_mkldnn()}, "student_weight: a tensor of layout torch._mkldnn was given"),
    ({"student_weight": torch.zeros(3)}, r"student_weight: shape \[3\] is not \[V, 3\]"),
    ({"student_weight": torch.zeros(0, 3)}, r"student_weight: shape \[0, 3\] is not"),
    ({"student_weight": W.to(META)}, "student_weight: on meta, and student_hidden is on cpu"),
    ({"student_bias": torch.zeros(4)}, r"student_bias: shape \[4\] is not \[5\]"),
    ({"student_bias": [0.0] * 5}, "student_bias: a list was given"),
    ({"student_bias": torch.zeros(5).to_sparse()}, "student_bias: a tensor of layout torch.sparse_coo"),
    ({"student_bias": torch.zeros(5, dtype=torch.bool)}, "student_bias: dtype torch.bool"),
    ({"teacher_logits": None}, "teacher_logits: None was given, and teacher_hidden is None too"),
    ({"teacher_logits": T.numpy()}, "teacher_logits: a ndarray was given"),
    ({"teacher_logits": T.to_sparse()}, "teacher_logits: a tensor of layout torch.sparse_coo"),
    ({"teacher_logits": torch.zeros(4, 6)}, r"teacher_logits: shape \[4, 6\] is not \[4, 5\]$"),
    ({"teacher_logits": torch.zeros(2, 2, 5)}, r"teacher_logits: shape \[2, 2, 5\] is not \[4, 5\]$"),
    ({"teacher_logits": T.long()}, "teacher_logits: dtype torch.int64"),
    ({"teacher_logits": T.to(META)}, "teacher_logits: on meta"),
    ({"teacher_hidden": HT}, "teacher_hidden: given beside teacher_logits"),
    ({"teacher_weight": WT}, "teacher_weight: given beside teacher_logits"),
    ({"teacher_bias": torch.zeros(5)}, "teacher_bias: given beside teacher_logits"),
    ({**HIDDEN_TEACHER, "teacher_weight": None}, "teacher_weight: None was given, and teacher_hidden needs it"),
    ({**HIDDEN_TEACHER, "teacher_hidden": HT[:3]}, r"teacher_hidden: shape \[3, 2\] is not \[4, 2\]"),
    ({**HIDDEN_TEACHER, "teacher_hidden": H}, r"teacher_weight: shape \[5, 2\] is not \[V, 3\], as teacher_hidden"),
    ({**HIDDEN_TEACHER, "teacher_hidden": HT.to(META)}, "teacher_hidden: on meta, and student_hidden is on cpu"),
    ({**HIDDEN_TEACHER, "teacher_weight": torch.zeros(6, 2)}, "teacher_weight: .* 6 outputs, and student_weight 5"),
    ({**HIDDEN_TEACHER, "teacher_hidden": [[0.0]]}, "teacher_hidden: a list was given"),
    ({**HIDDEN_TEACHER, "teacher_hidden": HT.int()}, "teacher_hidden: dtype torch.int32"),
    ({**HIDDEN_TEACHER, "teacher_weight": WT.to_sparse()}, "teacher_weight: a tensor of layout torch.sparse_coo"),
    ({**HIDDEN_TEACHER, "teacher_bias": 0.0}, "teacher_bias: a float was given"),
    ({**HIDDEN_TEACHER, "teacher_bias": torch.zeros(6)}, r"teacher_bias: shape \[6\] is not \[5\]"),
    ({"labels": Y.int()}, "labels: a torch.int32 tensor was given; an int64"),
    ({"labels": [0, 1, 2, 3]}, "labels: a list was given"),
    ({"labels": Y.to_sparse()}, "labels: a tensor of layout torch.sparse_coo"),
    ({"labels": Y[:3]}, r"labels: shape \[3\] is not \[4\], one for each row of student_hidden \[4, 3\]"),
    ({"labels": Y.to(META)}, "labels: on meta"),
    ({"label_weight": 1.0}, "labels: None was given, and label_weight is 1.0"),
    ({"temperature": 0}, "temperature: 0 is not"),
    ({"temperature": "hot"}, "temperature: 'hot' is not"),
    ({"kd_weight": -1.0}, "kd_weight: -1.0 is not"),
    ({"kd_weight": None}, "kd_weight: None is not"),
    ({"label_weight": float("nan")}, "label_weight: nan is not"),
    ({"scale_t2": 1}, "scale_t2: 1 is not True or False"),
    ({"return_terms": "yes"}, "return_terms: 'yes' is not True or False"),
    ({"ignore_index": 0.5}, "ignore_index: 0.5 is not"),
    ({"reduction": ["mean"]}, r"reduction: \['mean'\] is unknown"),
    ({"reduction": "batchmean"}, "reduction: 'batchmean' is unknown; did you mean 'mean'"),
    ({"chunk_bytes": 0}, "chunk_bytes: 0 is not a whole number from 1 up"),
    ({"chunk_bytes": 1e6}, "chunk_bytes: 1000000.0 is not"),
    ({"chunk_bytes": True}, "chunk_bytes: True is not"),
    ({"chunk_bytes": 2**63}, "chunk_bytes: 9223372036854775808 is not"),
]


@pytest.mark.parametrize(("wrong", "message"), CALLS)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    arguments = {"student_hidden": H, "student_weight": W, "teacher_logits": T, **wrong}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        fused_linear_kd(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_a_label_out_of_range_is_named_by_its_row_in_the_batch(label_weight: float, reduction: str) -> None:
    """Not by that in its chunk."""
    for labels, message in (([0, -100, 1, 5], "labels: 5 in row 3"), ([0, 1, -1, 5], "labels: -1 in row 2")):
        with pytest.raises(ValueError, match=rf"^{message} is out of range for 5 classes \(ignore_index is -100\)$"):
            fused_linear_kd(
                H,
                W,
                torch.tensor(labels),
                teacher_logits=T,
                label_weight=label_weight,
                reduction=reduction,
                chunk_bytes=1,
            )


def test_its_signature() -> None:
    """Hidden states, weight and labels by place, everything else by name."""
    parameters = inspect.signature(fused_linear_kd).parameters.values()
    by_place = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_place == ["student_hidden", "student_weight", "labels"]
    named = {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert named == {
        "teacher_logits": None,
        "teacher_hidden": None,
        "teacher_weight": None,
        "student_bias": None,
        "teacher_bias": None,
        "temperature": 1.0,
        "kd_weight": 1.0,
        "label_weight": 0.0,
        "scale_t2": True,
        "ignore_index": -100,
        "reduction": "mean",
        "chunk_bytes": None,
        "return_terms": False,
    }
    assert len(parameters) == len(by_place) + len(named)
