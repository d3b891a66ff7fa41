"""What a checkpoint relies on is on the disk before it is; and it is never one of numbers that are not finite."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Recorder, config, network, own
from torch import nn

from ban_fast.config import TeacherConfig
from ban_fast.errors import UserError
from ban_fast.training import Interrupted, run
from ban_fast.training.cache_store import FileRows


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files as each is synced, and as one takes another's place."""
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        seen.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        seen.append(f"rename {os.path.basename(target)}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_a_checkpoint_comes_after_all_that_it_speaks_of(tmp_path: Path, order: list[str]) -> None:
    """Rows, their confidences, the index that vouches for both, the metrics whose length it knows: then state.pt."""

    class StopInStudent(Recorder):
        def __call__(self) -> bool:
            return self.steps[1] == 2

    observer = StopInStudent()
    settings = config("cwtm", teacher=TeacherConfig(mode="cache", cache_directory=str(tmp_path / "kept")))
    settings.teacher.cache_dtype = "fp16"  # rounded rows have confidences beside them
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "run", observer=observer, should_stop=observer, **own())
    end = len(order) - order[::-1].index("rename state.pt")
    *before, written, renamed = order[end - 6 : end]
    assert set(before) == {f"fsync {file}" for file in ("rows.bin", "confidence.bin", "index.bin", "metrics.jsonl")}
    assert (written, renamed) == ("fsync state.pt.tmp", "rename state.pt")


def test_rows_are_synced_with_the_index_last(tmp_path: Path, order: list[str]) -> None:
    """Once after they were added to, and not again."""
    rows = FileRows(tmp_path / "cache", {"format": 1}, 3, torch.float16, with_confidence=True)
    order.clear()
    rows.sync()
    assert order == []
    rows.append(torch.randn(2, 3), 2, torch.arange(2), torch.rand(2, 1))
    for _ in range(2):
        rows.sync()
        assert order == ["fsync rows.bin", "fsync confidence.bin", "fsync index.bin"]
    rows.close()


def test_a_weight_that_is_not_finite_reaches_no_checkpoint(tmp_path: Path) -> None:
    """Though no loss has shown it yet: the checkpoint of the step before stays as it is."""
    state, made, kept = tmp_path / "generation-0" / "state.pt", [], []

    def factory() -> nn.Module:
        made.append(network())
        return made[-1]

    class Broken(Recorder):
        def __call__(self) -> bool:
            if self.steps[0] == 2:
                made[-1][-1].weight.data[0, 0] = float("inf")
                kept.append(state.read_bytes())
            return bool(kept)

    observer = Broken()
    with pytest.raises(UserError, match=r"^a weight is not finite in generation 0, epoch 1, at step 2: lower --lr"):
        run(
            config(checkpoint_seconds=0.0),
            out=tmp_path,
            observer=observer,
            should_stop=observer,
            **own(model=factory),
        )
    assert [state.read_bytes()] == kept
    assert not list(tmp_path.rglob("*.tmp"))
