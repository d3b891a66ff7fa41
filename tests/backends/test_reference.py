"""What the reference can show without a GPU: it never looks at values, and bad indices read nothing."""

import pytest
import torch
from torch import Tensor

from ban_fast.backends import reference
from ban_fast.losses import cwtm_loss, dkpp_loss, dkpp_targets, kd_loss

META = torch.device("meta")
LABELS = torch.tensor([0, -100, 4, 2, 1, 3])


def logits(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=dtype, device=device, requires_grad=True), torch.randn(9, 5, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_no_value_is_read_on_the_host(dtype: torch.dtype) -> None:
    """Tensors on "meta" have no values: .item(), bool(t), boolean indexing and torch.equal fail on them, as they would
    wait for a GPU, or break the capture of a CUDA graph."""
    student, teacher = logits(dtype, META)
    labels, rows = LABELS.to(META), torch.empty(6, dtype=torch.int64, device=META)
    step = torch.empty((), dtype=torch.int64, device=META)
    confidence, normalizer = torch.empty(9, device=META), torch.empty((), device=META)
    for reduction in ("mean", "sum", "none"):
        options = {"label_weight": 0.5, "reduction": reduction, "teacher_rows": rows, "return_terms": True}
        loss, _ = kd_loss(student, teacher, labels, **options)
        loss.sum().backward()
        loss, _ = dkpp_loss(student, teacher, labels, sample_ids=rows, step=step, **options)
        loss.sum().backward()
    for weight_by in ("teacher_max", "teacher_label"):
        cwtm_loss(student, teacher, labels, teacher_rows=rows, weight_by=weight_by).backward()
    cwtm_loss(student, None, labels, confidence=confidence, normalizer=normalizer, teacher_rows=rows).backward()
    assert dkpp_targets(teacher, step=step, teacher_rows=rows).shape == (6, 5)
    for classes in (1, 2, 50, 150, 2000):
        permutation = reference.dkpp_permutation(rows, rows, step, seed=3, num_classes=classes)
        assert permutation.shape == (6, classes)
    assert student.grad.shape == (6, 5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's look at the indices left out."""
    monkeypatch.setattr(reference, "_refuse", lambda *arguments: None)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("label", [5, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("what", ["labels", "teacher_rows"])
def test_an_index_out_of_range_is_a_nan_and_no_gradient_in_its_row(what: str, label: int) -> None:
    student, teacher = logits()
    labels, rows = LABELS.clone(), torch.arange(6)
    bad = label + 4 if what == "teacher_rows" and label == 5 else label
    (labels if what == "labels" else rows)[2] = bad
    sound = [0, 3, 4, 5]
    for loss_function, options in (
        (kd_loss, {"label_weight": 0.5, "reduction": "none"}),
        (kd_loss, {"reduction": "none"}),
        (dkpp_loss, {"label_weight": 0.5, "reduction": "none"}),
    ):
        loss = loss_function(student, teacher, labels, teacher_rows=rows, backend="reference", **options)
        expected = loss_function(student, teacher[:6], LABELS, backend="reference", **options)
        assert loss[2].isnan()
        assert loss[1] == 0
        assert torch.equal(loss[sound], expected[sound])
        grad = torch.autograd.grad(loss.sum(), student)[0]
        assert not grad[[1, 2]].any()
        assert torch.equal(grad[sound], torch.autograd.grad(expected.sum(), student)[0][sound])
    for weight_by in ("teacher_max", "teacher_label"):
        loss = cwtm_loss(student, teacher, labels, teacher_rows=rows, weight_by=weight_by, backend="reference")
        assert loss.isnan()
        grad = torch.autograd.grad(loss, student)[0]
        assert not grad[[1, 2]].any()
        assert grad[sound].isfinite().all()
        assert grad[sound].any(1).all()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_targets_of_a_row_that_is_not_there_are_nan() -> None:
    targets = dkpp_targets(torch.randn(4, 5), teacher_rows=torch.tensor([0, 4, -1]), backend="reference")
    assert targets[0].isfinite().all()
    assert targets[1:].isnan().all()
