"""Gradients added up over micro-batches are the whole batch's: normalisers over all of it, nothing counted twice."""

from pathlib import Path

import pytest
import torch
from small_runs import (
    BATCH,
    CLASSES,
    IMAGES,
    STEPS,
    Recorder,
    StopAt,
    but_for_teachers,
    config,
    footprint,
    network,
    own,
    samples,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import OptimizerConfig, TeacherConfig
from ban_fast.data import Batch
from ban_fast.training import Interrupted, run
from ban_fast.training.accumulate import parts, with_total
from ban_fast.training.teacher import Taught


class Precise(nn.Module):
    """In fp64 and without batch norm, so that only the order of sums can differ."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double())


@pytest.mark.parametrize("objective", ["label", "ban", "ban+l", "cwtm", "dkpp"])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_same_weights_in_double_precision(objective: str, size: int) -> None:
    """12 steps whose sums are ordered otherwise: 1e-16 each, and some growth. CWTM: eq 10 over the whole batch."""
    optimizer = OptimizerConfig(lr=0.02, schedule="constant")
    common = {"generations": 1, "optimizer": optimizer, "teacher": TeacherConfig(mode="live")}
    whole, parted = Recorder(), Recorder()
    expected = run(config(objective, **common), observer=whole, **own(model=Precise)).models[1]
    found = run(config(objective, micro_batch_size=size, **common), observer=parted, **own(model=Precise)).models[1]
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    for (_, mine), (_, theirs) in zip(parted.epochs, whole.epochs, strict=True):
        assert mine["train"]["error"] == theirs["train"]["error"]
        for term in ("loss", "kd", "label"):
            assert mine["train"][term] == pytest.approx(theirs["train"][term], abs=1e-12)
    assert parted.steps == {0: STEPS, 1: STEPS}
    assert not parted.messages


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_cached_rows_are_parted_too(amp: str, tmp_path: Path) -> None:
    for mode in ("live", "auto"):
        settings = config("ban+l", micro_batch_size=6, amp=amp, teacher=TeacherConfig(mode=mode))
        run(settings, out=tmp_path / mode, **own())
    assert but_for_teachers(footprint(tmp_path / "live")) == but_for_teachers(footprint(tmp_path / "auto"))


def test_stopped_and_resumed(tmp_path: Path) -> None:
    settings = config("cwtm", micro_batch_size=6)
    run(settings, out=tmp_path / "whole", **own())
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "parts", should_stop=StopAt(STEPS + 10), **own())
    run(settings, out=tmp_path / "parts", resume=True, **own())
    assert footprint(tmp_path / "parts") == footprint(tmp_path / "whole")


def test_batch_norm_is_said_once() -> None:
    observer = Recorder()
    run(config(micro_batch_size=5), observer=observer, **own(model=network))
    (said,) = observer.messages
    assert "batch normalisation takes its statistics from micro-batches of 5 images" in said


@pytest.mark.parametrize("batch_size", [BATCH, IMAGES + BATCH])
def test_a_batch_that_is_not_divided_is_whole_to_batch_norm(batch_size: int) -> None:
    """As large as a micro-batch, or cut down to it by the data."""
    observer = Recorder()
    size = min(batch_size, IMAGES)
    settings = config(batch_size=batch_size, micro_batch_size=size, generations=0, epochs=1)
    run(settings, observer=observer, **own(model=network))
    assert not observer.messages


@pytest.mark.parametrize(("served", "is_divided"), [(6, False), (24, True)])
def test_a_dataloader_has_batches_of_its_own_size(served: int, is_divided: bool) -> None:
    observer = Recorder()
    loader = DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=served)
    settings = config(micro_batch_size=BATCH, generations=0, epochs=1)
    run(settings, observer=observer, **own(model=network, train=loader))
    assert any("batch normalisation" in said for said in observer.messages) == is_divided


@pytest.mark.parametrize("size", [1, 3, 5, 15, 16, 99])
def test_parts_are_even_and_whole(size: int) -> None:
    logits = torch.randn(BATCH, CLASSES)
    batch = Batch(torch.randn(BATCH, 1), *(torch.arange(BATCH) for _ in range(3)))
    for taught in (Taught(logits), Taught(logits.flip(0), torch.arange(BATCH).flip(0)), None):
        cut = parts(batch, taught, size, BATCH)
        sizes = [len(part.batch.labels) for part in cut]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert sum(part.share for part in cut) == pytest.approx(1, abs=1e-15)
        assert torch.equal(torch.cat([part.batch.labels for part in cut]), batch.labels)
        if taught is not None:
            rows = [p.taught.logits if p.taught.rows is None else p.taught.logits[p.taught.rows] for p in cut]
            assert torch.equal(torch.cat(rows), logits)


def test_the_total_is_that_of_every_form() -> None:
    logits = torch.randn(BATCH, CLASSES) * 3
    c = logits.softmax(1).amax(1)
    rows = torch.arange(BATCH).flip(0)
    expected = logits.double().softmax(1).amax(1).sum()
    for taught in (Taught(logits), Taught(logits[rows], rows), Taught(None, None, c), Taught(None, rows, c[rows])):
        total = with_total(taught).total
        assert total is not None
        torch.testing.assert_close(total, expected, rtol=1e-7, atol=0)  # fp32 confidences: 6e-8
