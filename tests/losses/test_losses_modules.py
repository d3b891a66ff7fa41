"""The modules hand every option and every argument of a call on: off its default, the function's own value."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ban_fast.losses import CWTMLoss, DKPPLoss, KDLoss, cwtm_loss, dkpp_loss, kd_loss

ROWS, CLASSES, KEPT = 12, 10, 20
NOISE = torch.randn(ROWS + KEPT, CLASSES, generator=torch.Generator().manual_seed(0))
STUDENT, TEACHER = NOISE.split([ROWS, KEPT])
LABELS = torch.arange(ROWS) % 4
ROWS_OF_TEACHER = torch.arange(ROWS).flip(0) + 5

KD: dict[str, Any] = {
    "temperature": 2.5,
    "kd_weight": 0.7,
    "label_weight": 0.4,
    "divergence": "ce",
    "scale_t2": False,
    "ignore_index": 3,
    "reduction": "sum",
}
CASES: dict[str, tuple[type[nn.Module], Callable[..., Tensor], Tensor | None, dict[str, Any], dict[str, Any]]] = {
    "kd": (KDLoss, kd_loss, TEACHER, KD, {"teacher_rows": ROWS_OF_TEACHER}),
    "cwtm": (
        CWTMLoss,
        cwtm_loss,
        TEACHER,
        {"weight_by": "teacher_label", "ignore_index": 3},
        {"normalizer": torch.tensor(7.0), "teacher_rows": ROWS_OF_TEACHER},
    ),
    "cwtm by confidences": (
        CWTMLoss,
        cwtm_loss,
        None,
        {"ignore_index": 3},
        {
            "confidence": torch.linspace(0.1, 1, KEPT),
            "normalizer": torch.tensor(7.0),
            "teacher_rows": ROWS_OF_TEACHER,
        },
    ),
    "dkpp": (
        DKPPLoss,
        dkpp_loss,
        TEACHER,
        {**KD, "seed": 5},
        {"step": 3, "sample_ids": torch.arange(ROWS) + 40, "teacher_rows": ROWS_OF_TEACHER},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_its_function(backend: str, case: str) -> None:
    module, function, teacher, options, call = CASES[case]
    expected = function(STUDENT, teacher, LABELS, backend=backend, **options, **call)
    assert torch.equal(module(backend=backend, **options)(STUDENT, teacher, LABELS, **call), expected)


@pytest.mark.parametrize("case", CASES)
def test_none_of_them_is_without_effect_here(case: str) -> None:
    """Without any one of them, `TEACHER`'s first rows aside, the value is another: so a module that drops one fails."""
    _, function, teacher, options, call = CASES[case]
    given = {**options, **call}
    expected = function(STUDENT, teacher, LABELS, **given)
    for name in given:
        rest = {other: value for other, value in given.items() if other != name}
        if name == "teacher_rows":
            rest |= {"confidence": call["confidence"][:ROWS]} if "confidence" in call else {}
            shown = None if teacher is None else teacher[:ROWS]
            found = function(STUDENT, shown, LABELS, **rest)
        elif name == "confidence":
            found = function(STUDENT, TEACHER, LABELS, **rest)
        else:
            found = function(STUDENT, teacher, LABELS, **rest)
        assert found.shape != expected.shape or not torch.equal(found, expected), name


@pytest.mark.parametrize("function", [kd_loss, cwtm_loss, dkpp_loss])
def test_all_of_them_are_here(function: Callable[..., Tensor]) -> None:
    cases = [case for case in CASES.values() if case[1] is function]
    given = {name for _, _, _, options, call in cases for name in (*options, *call)}
    tensors = {"student_logits", "teacher_logits", "labels", "backend"}
    asked = inspect.signature(function).parameters
    assert given == set(asked) - tensors - {"return_terms"}
