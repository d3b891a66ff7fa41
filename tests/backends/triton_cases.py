"""Run by test_triton.py in a process of its own, where TRITON_INTERPRET=1: prints the Triton backend's errors as JSON.

Truth is the reference backend on float64 copies of the same bits, itself held to float64 autograd in tests/losses.
"""

import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from ban_fast.backends import reference, triton
from ban_fast.backends.interface import LossOutput

ROWS, CACHE = 7, 11
INF = float("inf")


def relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def errors(found: LossOutput, expected: LossOutput) -> list[float]:
    """Relative errors of loss, terms and gradient; infinite for a negative KL or a gradient that is missing."""
    assert found.grad is not None
    assert expected.grad is not None
    gradient = found.grad.double() * (1.0 if found.grad_scale is None else found.grad_scale.double())
    values = [relative(a, b) for a, b in zip(found[:3], expected[:3], strict=True)]
    return [*values, relative(gradient, expected.grad)]


def losses(name: str, student: Tensor, teacher: Tensor, **options: Any) -> list[list[float]]:
    """Errors of one loss, with labels of which one is ignored, over the ways of calling it."""
    labels = torch.arange(ROWS) % student.shape[1]
    labels[2] = -100
    rows = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    found = []
    exact = student.double(), teacher.double()
    if name == "cwtm":
        for by in ("teacher_max", "teacher_label"):
            arguments = (labels, None, None, rows)
            keywords: dict[str, Any] = {"weight_by": by, "ignore_index": -100, "need_grad": True}
            got = triton.cwtm(student, teacher, *arguments, **keywords)
            found.append(errors(got, reference.cwtm(*exact, *arguments, **keywords)))
        confidence = torch.rand(CACHE)
        arguments = (labels, confidence, torch.tensor(5.0), rows)
        got = triton.cwtm(student, None, *arguments, **keywords)
        wide = (labels, confidence.double(), torch.tensor(5.0).double(), rows)
        found.append(errors(got, reference.cwtm(exact[0], None, *wide, **keywords)))
        return found
    keyed = (torch.arange(ROWS) * 1_000_003, torch.tensor(5)) if name == "dkpp" else ()
    seed = {"seed": 11} if name == "dkpp" else {}
    for reduction in ("mean", "sum", "none"):
        for divergence in ("kl", "ce"):
            keywords = {
                "temperature": 3.5,
                "kd_weight": 0.7,
                "label_weight": 0.3,
                "scale_t2": True,
                "ignore_index": -100,
                "need_grad": True,
                **options,
                **seed,
            }
            arguments = (labels, *keyed, rows)
            keywords |= {"reduction": reduction, "divergence": divergence}
            got = getattr(triton, name)(student, teacher, *arguments, **keywords)
            found.append(errors(got, getattr(reference, name)(*exact, *arguments, **keywords)))
    return found


def accuracy(cases: list[str]) -> dict[str, float]:
    """Worst errors, by loss, dtype and regime, over cases like "10:float32"; the student's columns are strided."""
    worst: dict[str, float] = {}
    for case in cases:
        size, dtype = case.split(":")
        classes = int(size)
        # In half precision 1e-3 beside logits of 2 is below their rounding.
        for regime in ("random", "near") if dtype in ("float32", "float64") else ("random",):
            torch.manual_seed(classes)
            teacher = 2 * torch.randn(CACHE, classes, dtype=torch.float64)
            if regime == "near":
                student = teacher[torch.tensor([3, 1, 4, 1, 5, 9, 2])] + 5 + 1e-3 * torch.randn(ROWS, classes)
            else:
                student = 2 * torch.randn(ROWS, classes, dtype=torch.float64)
            z, t = (x.to(getattr(torch, dtype)) for x in (student, teacher))
            for name in ("kd", "dkpp", "cwtm"):
                for part in losses(name, z.t().contiguous().t(), t):
                    for what, error in zip(("value", "value", "value", "gradient"), part, strict=True):
                        key = f"{name} {dtype} {regime} {what}"
                        worst[key] = max(worst.get(key, 0.0), error if error == error else INF)
    return worst


def corners() -> dict[str, bool]:
    """What must hold exactly."""
    torch.manual_seed(0)
    keywords: dict[str, Any] = {
        "temperature": 1.0,
        "kd_weight": 1.0,
        "label_weight": 0.0,
        "divergence": "kl",
        "scale_t2": True,
        "ignore_index": -100,
        "reduction": "mean",
    }
    z, t = torch.randn(4, 33), torch.randn(4, 33)
    held = {}
    empty = triton.kd(z[:0], t[:0], None, None, **keywords, need_grad=True)
    held["an empty batch is 0"] = float(empty.loss) == 0 and empty.grad is not None and empty.grad.shape == (0, 33)
    ignored = triton.kd(z, t, torch.full((4,), -100), None, **keywords, need_grad=True)
    held["all rows ignored are 0"] = float(ignored.loss) == 0 and not ignored.grad.any()  # type: ignore[union-attr]
    held["forward only stores nothing"] = triton.kd(z, t, None, None, **keywords, need_grad=False).grad is None
    same = triton.kd(t, t, None, None, **keywords, need_grad=True)
    held["equal logits are exactly nothing"] = float(same.loss) == 0 and not same.grad.any()  # type: ignore[union-attr]

    none: dict[str, Any] = {**keywords, "reduction": "none", "need_grad": True}
    wrong = triton.kd(z, t, torch.tensor([0, 99, 1, 2]), None, **{**none, "label_weight": 1.0})
    held["a label out of range is NaN, without a gradient"] = (
        wrong.loss.isnan().tolist() == [False, True, False, False] and not wrong.grad[1].any()  # type: ignore[index]
    )
    far = triton.kd(z, t, None, torch.tensor([0, 1, 99, -1]), **none)
    held["a teacher row out of range likewise"] = (
        far.loss.isnan().tolist() == [False, False, True, True] and not far.grad[2:].any()  # type: ignore[index]
    )
    z[:, 5] = t[:, 5] = -INF
    t[1, 6], z[2] = -INF, 1e4 * z[2].sign()
    got, expected = triton.kd(z, t, None, None, **none), reference.kd(z.double(), t.double(), None, None, **none)
    held["-inf and 1e4"] = bool(relative(got.loss, expected.loss) < 1e-5 and errors(got, expected)[-1] < 1e-5)

    for classes in (2, 3, 10, 99, 100, 101, 129, 1001):
        ids, kept = torch.tensor([0, -5, 2**62, 7]), torch.tensor([0, 1, classes - 1, classes // 2])
        for step in (0, torch.tensor(2**40)):
            key: tuple[Any, ...] = (kept, ids, step)
            pair = [b.dkpp_permutation(*key, seed=-3, num_classes=classes) for b in (triton, reference)]
            held[f"permutation bits, {classes} classes, step {int(step)}"] = torch.equal(*pair)
    grad = torch.randn(4, 33)
    scaled = triton.scale_grad_(grad.clone(), torch.tensor(0.3), torch.tensor(0.5))
    held["the gradient is scaled"] = torch.equal(scaled, grad * (torch.tensor(0.3) * 0.5))
    return held


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    json.dump(accuracy(sys.argv[1:]) if sys.argv[1:] else corners(), sys.stdout)
