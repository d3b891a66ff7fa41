"""`usual_kd` gives what the general path gives, bit for bit, or None."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ban_fast.backends import native
from ban_fast.losses import KDLoss
from ban_fast.ops.kd import kd_loss

ROWS, CLASSES = 6, 37


def logits(rows: int = ROWS, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))).to(dtype)


def usual(**changed: Any) -> Any:
    call: dict[str, Any] = {  # in the order of the call
        "student": logits(),
        "teacher": logits(seed=1),
        "labels": torch.tensor([3, 36, -100, 0, 5, 5]),
        "teacher_rows": None,
        "temperature": 1.0,
        "kd_weight": 1.0,
        "label_weight": 0.0,
        "divergence": "kl",
        "scale_t2": True,
        "ignore_index": -100,
        "reduction": "mean",
        "need_grad": True,
        "threads": 1,
    }
    assert changed.keys() <= call.keys()
    return native.usual_kd(*(call | changed).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 4, "label_weight": 0.5, "divergence": "ce", "reduction": "sum", "scale_t2": False},
        {"labels": None, "kd_weight": 3},
        {"teacher": logits(9, seed=2), "teacher_rows": torch.tensor([8, 0, 0, 3, 1, 7])},
        {"teacher": logits(seed=1, dtype=torch.bfloat16), "ignore_index": -100, "need_grad": False},
        {"teacher": logits(2 * ROWS, seed=3)[::2]},
    ],
    ids=["plain", "options", "no labels", "teacher rows", "no gradient", "strided"],
)
def test_it_is_the_general_call(dtype: torch.dtype, options: dict[str, Any]) -> None:
    student = logits(dtype=dtype)
    general = {"labels": torch.tensor([3, 36, -100, 0, 5, 5]), "teacher": logits(seed=1), "teacher_rows": None}
    general |= {"temperature": 1.0, "kd_weight": 1.0, "label_weight": 0.0, "divergence": "kl", "scale_t2": True}
    general |= {"ignore_index": -100, "reduction": "mean", "need_grad": True} | options
    expected = native.kd(student, **general)
    loss, grad, grad_scale = usual(student=student, **options)
    assert loss.dtype == expected.loss.dtype
    assert torch.equal(loss, expected.loss)
    for found, value in ((grad, expected.grad), (grad_scale, expected.grad_scale)):
        if value is None:
            assert found is None
        else:
            assert found.dtype == value.dtype
            assert found.is_contiguous()
            assert torch.equal(found, value)


class Own(Tensor):
    """A tensor of a user's own kind."""


@pytest.mark.parametrize(
    "change",
    [
        {"student": None},
        {"student": logits().as_subclass(Own)},
        {"student": logits()[0]},
        {"student": logits().long()},
        {"student": logits().to("meta")},
        {"student": logits()[:0], "teacher": logits()[:0], "labels": None},
        {"student": torch.zeros(ROWS, 50_000), "teacher": torch.zeros(ROWS, 50_000)},
        {"teacher": logits().as_subclass(Own)},
        {"teacher": logits(5)},
        {"teacher": logits()[:, 1:]},
        {"teacher": logits().to("meta")},
        {"teacher": logits().to_sparse()},
        {"teacher": torch._efficientzerotensor(ROWS, CLASSES)},
        {"labels": torch.zeros(ROWS, dtype=torch.int32)},
        {"labels": torch.zeros(5, dtype=torch.int64)},
        {"labels": torch.zeros(2 * ROWS, dtype=torch.int64)[::2]},
        {"labels": torch.full((ROWS,), CLASSES)},
        {"labels": None, "label_weight": 0.1},
        {"teacher_rows": torch.full((ROWS,), ROWS)},
        {"teacher_rows": torch.zeros(ROWS)},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": np.float32(1)},
        {"kd_weight": -1.0},
        {"label_weight": float("inf")},
        {"divergence": "js"},
        {"divergence": None},
        {"scale_t2": 1},
        {"ignore_index": 1 << 63},
        {"ignore_index": 1.0},
        {"reduction": "none"},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_is_unusual_is_left_to_the_general_call(change: dict[str, Any]) -> None:
    assert usual() is not None
    assert usual(**change) is None
    assert native.usual_kd() is None  # type: ignore[call-arg]


def test_losses_go_this_way_and_compute_no_gradient_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Any] = []
    compute = native.usual_kd

    def recorded(*call: Any) -> Any:
        outputs.append(compute(*call))
        return outputs[-1]

    monkeypatch.setattr(native, "usual_kd", recorded)
    student, teacher = logits().requires_grad_(), logits(seed=1)
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad
    with torch.inference_mode():
        assert kd_loss(student, teacher).is_inference()
    assert not kd_loss(student.detach(), teacher).requires_grad
    assert [grad for _, grad, _ in outputs] == [None] * 3
    loss = KDLoss(backend="native")(student, teacher)
    assert loss.item() == outputs[0][0].item()
    assert outputs[-1][1] is not None
    assert len(outputs) == 4


def test_options_may_change_between_calls() -> None:
    student, teacher = logits(), logits(seed=1)
    loss = KDLoss()
    loss(student, teacher)
    loss.temperature = 2.0
    assert torch.equal(loss(student, teacher), kd_loss(student, teacher, temperature=2.0))
    loss.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature: -1\.0 is not an int or float"):
        loss(student, teacher)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_results_give_their_memory_back() -> None:
    student, teacher = logits(5000).requires_grad_(), logits(5000, seed=1)
    rows = torch.full((5000,), 5000)
    before = resident_mib()
    for _ in range(300):  # 0.7 MiB each
        (grad,) = torch.autograd.grad(kd_loss(student, teacher), student)
        assert usual(student=student, teacher=teacher, labels=None, teacher_rows=rows) is None
    kept = grad.view(-1)[1:]
    expected = kept.clone()
    del grad
    torch.autograd.grad(kd_loss(student, -teacher), student)
    assert torch.equal(kept, expected)
    assert resident_mib() - before < 100  # 420 MiB would have leaked


@pytest.mark.slow
def test_torch_without_the_exchange_api() -> None:
    script = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from ban_fast.backends import native
from ban_fast.losses import KDLoss
x, t = torch.zeros(2, 3, requires_grad=True), torch.eye(2, 3)
KDLoss(backend="native")(x, t).backward()
assert native.usual_kd(x, t, None, None, 1.0, 1.0, 0.0, "kl", True, -100, "mean", True, 1) is None
assert x.grad.any()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
